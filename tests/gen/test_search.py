"""Searches: they say which candidates go on and never what their pixels are, and each takes what it says it takes."""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen import Request, Result, Step, TextToImage
from gen.candidate import Before
from gen.engine import Engine
from gen.search import (
    SEARCHES,
    BestOf,
    Draft,
    FeynmanKac,
    Field,
    Go,
    Halving,
    Moves,
    Racing,
    Scout,
    ZeroOrder,
    diverse_first,
)
from gen.search.rules import LINE, overtaking, resampled
from tests.engines import altered, buckets_of, run

LEVEL = 1 / 255  # one 8-bit level
STEPS = 10
ASKED = Request(
    prompt=["a small red circle", "a star above a blue square"],
    num_images_per_prompt=8,
    keep=2,
    seed=[5, 50],
    num_inference_steps=STEPS,
    output_type="pt",
)
NOISY = replace(ASKED, sampler="ddpm")
CHOOSING: dict[str, Request] = {
    "halving": replace(ASKED, search="halving"),
    "late halving": replace(ASKED, search=Halving(rungs=(0.8, 0.9), goes_on=0.4), prior=False),
    "draft": replace(ASKED, search="draft"),
    "racing": replace(ASKED, search=Racing(wave=1, risk=0.9), keep=1),
}
LARGE = replace(ASKED, prompt="a star", height=136, width=136, num_images_per_prompt=5, prior=False, seed=5)
CHOOSING |= {
    "large halving": replace(LARGE, search="halving"),
    "large racing": replace(LARGE, search=Racing(wave=1, risk=0.9), keep=1),
}
MAKING: dict[str, Request] = {
    "feynman_kac": replace(NOISY, search=FeynmanKac(strength=20.0)),
    "zero_order": replace(ASKED, search=ZeroOrder(rounds=3)),
    "zero_order, noisy": replace(NOISY, search="zero_order", prior=False),
}


@pytest.fixture(scope="module")
def plain(tiny: TextToImage) -> dict[int, Tensor]:
    """Every candidate's picture, by its seed; all are painted and kept."""
    result = tiny.paint([replace(ASKED, keep=None)])[0]
    return dict(zip(result.seeds, result.images, strict=True))


# --- what a search may not change --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["halving", "draft", "racing"])
def test_a_candidate_that_goes_on_looks_as_if_there_were_no_search(
    tiny: TextToImage, plain: dict[int, Tensor], name: str
) -> None:
    result = tiny.paint([CHOOSING[name]])[0]
    assert len(result.images) == 2 * (CHOOSING[name].keep or 0)
    assert 0 < sum(each.painted for each in result.candidates) < 16
    for seed, image in zip(result.seeds, result.images, strict=True):
        assert (image - plain[seed]).abs().max() <= LEVEL
    assert not torch.allclose(plain[5], plain[6], atol=LEVEL)


@pytest.mark.parametrize("name", [*CHOOSING, *MAKING])
def test_a_search_does_not_notice_what_else_runs(tiny: TextToImage, name: str) -> None:
    """Alone with all rows in one batch, and beside others with three rows in flight: the same pictures come of it."""
    request = (CHOOSING | MAKING)[name]
    alone = tiny.paint([request])[0]
    engine = tiny.engine(max_rows=3)
    others = [engine.submit(replace(ASKED, seed=99, num_inference_steps=4)), engine.submit(CHOOSING["draft"])]
    future = engine.submit(request)
    run(engine)
    crowded = future.result(timeout=0)
    assert all(other.done() for other in others)
    assert [each.painted for each in crowded.candidates] == [each.painted for each in alone.candidates]
    assert crowded.seeds == alone.seeds and vars(crowded.account) == vars(alone.account)
    assert (crowded.images - alone.images).abs().max() <= LEVEL
    assert [record.get("noise_path") for record in crowded.records] == [r.get("noise_path") for r in alone.records]


@pytest.mark.parametrize("name", [*CHOOSING, *MAKING])
def test_every_record_paints_its_picture_again(tiny: TextToImage, name: str) -> None:
    result = tiny.paint([replace((CHOOSING | MAKING)[name], keep=7 if name in MAKING else 2)])[0]
    for image, record in zip(result.images, result.records, strict=True):
        assert (tiny.repaint(json.loads(json.dumps(record))) - image).abs().max() <= LEVEL


# --- what it takes -----------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """What the networks were really asked."""

    model: TextToImage
    seen: Counter[str]


@pytest.fixture
def counted(tiny: TextToImage) -> Counted:
    """The tiny model, counting; its memory is measured and its preview fitted already."""
    seen: Counter[str] = Counter()

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(given: Tensor, *rest: Any) -> Tensor:
            seen[name] += len(given)
            return function(given, *rest)

        return call

    clip, prior = copy.copy(tiny.model.clip), copy.deepcopy(tiny.model.prior)
    assert clip is not None and prior is not None
    vars(clip)["image"] = noted("score", clip.image)
    methods = {name: noted(name, getattr(tiny.model, name)) for name in ("call", "decode", "preview")}
    model = altered(tiny, clip=clip, prior=prior, **methods)
    model.paint([ASKED, LARGE, CHOOSING["large halving"]])
    prior.network.proj_in.register_forward_hook(lambda module, given, out: seen.update(prior=len(out)))
    seen.clear()
    return Counted(model, seen)


@pytest.mark.parametrize("name", [*CHOOSING, *MAKING])
def test_the_account_is_exact(counted: Counted, name: str) -> None:
    account = counted.model.paint([(CHOOSING | MAKING)[name]])[0].account
    seen = counted.seen
    assert account.evaluations == {"prior": seen["prior"], "decoder": seen["call"], "super_resolution": 0}
    assert (account.decodes, account.previews) == (seen["decode"], seen["preview"])
    assert account.scores == seen["score"] == account.decodes + account.previews
    assert (account.previews > 0) == (name.startswith("large"))


def test_what_each_takes_by_the_book(tiny: TextToImage) -> None:
    """8 candidates of 10 steps, guided: two evaluations a step."""
    one = replace(ASKED, prompt="a star", seed=3, prior=False)
    asked = Halving(rungs=(0.3, 0.5, 0.7)), Draft(steps=0.25)
    halving, draft = (tiny.paint([replace(one, search=search)])[0].account for search in asked)
    # rungs at 3, 5 and 7: 8 candidates take 3 steps, 4 two more, 2 the last five; at the last rung nobody is left over
    assert halving.evaluations["decoder"] == 2 * (8 * 3 + 4 * 2 + 2 * 5)
    assert (halving.decodes, halving.scores) == (8 + 4 + 2,) * 2
    # three are painted where two are kept
    assert draft.evaluations["decoder"] == 2 * (8 * 2 + 3 * 10)
    assert (draft.decodes, draft.scores) == (8 + 3,) * 2
    zero = tiny.paint([replace(one, search="zero_order")])[0].account
    assert (zero.evaluations["decoder"], zero.decodes, zero.scores) == (2 * 8 * 10, 8, 8)


def test_when_memory_runs_out_over_previews_fewer_are_looked_at_at_once(tiny: TextToImage) -> None:
    asked = replace(ASKED, prompt="a star", seed=3, prior=False, search=Halving(rungs=(0.3,)))
    sizes: list[int] = []

    def short(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tiny.model.decode(latents)

    ours, theirs = altered(tiny, decode=short).paint([asked])[0], tiny.paint([asked])[0]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]  # eight previews, four pictures
    assert ours.seeds == theirs.seeds and vars(ours.account) == vars(theirs.account)


def test_a_draft_asks_the_prior_once(tiny: TextToImage) -> None:
    plain, draft = (tiny.paint([replace(ASKED, prior=True, search=name)])[0].account for name in ("best_of", "draft"))
    assert draft.evaluations["prior"] == plain.evaluations["prior"] > 0


def test_the_places_of_those_given_up_are_taken_at_the_next_step(tiny: TextToImage) -> None:
    engine = Engine(tiny.model, tiny._result, max_rows=8, buckets=buckets_of(64))  # room for all
    one = replace(ASKED, prompt="a star", seed=0, prior=False)
    engine.submit(replace(one, search=Halving(rungs=(0.3,))))
    engine.submit(replace(one, seed=100, rerank=False, keep=None))
    seeds = []
    while engine.tick():
        seeds.append({live.row.seed for live in engine._stages.rows["decoder"].live})
    assert [len(each) for each in seeds[:4]] == [8, 8, 4, 8]  # three steps, the last of which gives four up
    assert all(seed < 100 for seed in seeds[1]) and sum(seed >= 100 for seed in seeds[3]) == 4


# --- how they choose ---------------------------------------------------------------------------------------------


def looks_at(model: TextToImage, request: Request, step: int) -> dict[int, float]:
    """CLIP's score of a preview of every candidate after so many steps, by seed."""
    found: dict[int, float] = {}

    def look(seen: Step) -> None:
        if seen.stage == "decoder":
            for seed, left, x0 in zip(seen.seeds, seen.steps_left, seen.x0, strict=True):
                if STEPS - left == step:
                    rounded = (model.model.decode(x0[None]) * 255).round() / 255
                    found[seed] = float(model.model.clip.score(rounded, request.prompt))  # type: ignore[union-attr]

    model.paint([replace(request, keep=None, search=None)], callback=look)
    return found


def best(scores: Mapping[int, float], number: int) -> set[int]:
    return set(sorted(scores, key=lambda seed: -scores[seed])[:number])


def test_halving_keeps_those_whose_preview_fits_best(tiny: TextToImage) -> None:
    one = replace(ASKED, prompt="a small red circle", seed=30)
    early = best(looks_at(tiny, one, 2), 4)
    late = looks_at(tiny, one, 6)
    result = tiny.paint([replace(one, search=Halving(rungs=(0.2, 0.6)), keep=1)])[0]
    painted = {each.seed for each in result.candidates if each.painted}
    assert painted == best({seed: late[seed] for seed in early}, 2)


def test_a_draft_is_the_picture_of_fewer_steps_from_the_same_noise(tiny: TextToImage) -> None:
    one = replace(ASKED, prompt="a small red circle", seed=30, search=Draft(steps=0.4, goes_on=0.3))
    sigmas = tiny.model.levels.schedule(tiny.model.abilities.defaults.sampler, 4).sigmas.tolist()
    draft = replace(one, num_inference_steps=4, guidance_interval=(sigmas[3], sigmas[1]))  # not at the first and last
    drafts = tiny.paint([replace(draft, keep=None, search=None, output_type="latent")])[0]
    pixels = tiny.model.decode(drafts.images)
    scores = tiny.model.clip.score((pixels * 255).round() / 255, "a small red circle")  # type: ignore[union-attr]
    expected = best(dict(zip(drafts.seeds, scores.tolist(), strict=True)), 3)
    assert {each.seed for each in tiny.paint([one])[0].candidates if each.painted} == expected


def test_racing_finishes_in_the_order_of_previews_and_stops_when_the_others_are_unlikely(tiny: TextToImage) -> None:
    one = replace(ASKED, prompt="a small red circle", seed=30, keep=1)
    order = looks_at(tiny, one, 6)
    scores = {each.seed: each.score for each in tiny.paint([replace(one, keep=None)])[0].candidates}
    result = tiny.paint([replace(one, search=Racing(rung=0.6, wave=1, risk=0.6))])[0]
    painted = {each.seed for each in result.candidates if each.painted}
    assert painted == best(order, len(painted))
    for number in range(4, 9):
        done = sorted(order, key=lambda seed: -order[seed])[:number]
        others = [order[seed] for seed in order if seed not in done]
        bound = max(scores[seed] for seed in done)  # type: ignore[type-var]
        chances = overtaking([order[s] for s in done], [scores[s] for s in done], others, bound)  # type: ignore[arg-type,misc]
        assert (sum(chances) <= 0.6) == (number >= len(painted))


def test_a_race_is_lost_no_more_often_than_its_risk_says() -> None:
    """Scores about a line over previews, as is assumed: the best of 32 is among those finished in 95 of 100 races."""
    draw = random.Random(0)
    lost = stopped = 0
    for _ in range(400):
        looks = sorted((draw.gauss(0, 1) for _ in range(32)), reverse=True)
        scores = [0.3 * look + draw.gauss(0, 0.1) for look in looks]
        for number in range(4, 33, 4):
            chances = overtaking(looks[:number], scores[:number], looks[number:], max(scores[:number]))
            if sum(chances) <= 0.05:
                break
        stopped += number < 32
        lost += max(scores) > max(scores[:number])
    assert stopped > 200 and lost <= 20


@pytest.mark.parametrize(
    ("t", "degrees"), [(12.7062, 1), (4.30265, 2), (3.18245, 3), (2.77645, 4), (2.57058, 5), (2.08596, 20)]
)
def test_a_bound_at_the_printed_tables_distance_is_passed_once_in_forty(t: float, degrees: int) -> None:
    """Student's table (two sides, 5 %) on the prediction interval of a line, worked out by least squares."""
    rng = np.random.default_rng(degrees)
    looks, scores, other = rng.normal(size=degrees + 2), rng.normal(size=degrees + 2), 0.7
    design = np.stack([np.ones_like(looks), looks], axis=1)
    line, residual, *_ = np.linalg.lstsq(design, scores, rcond=None)
    at = np.array([1.0, other])
    error = np.sqrt(residual[0] / degrees * (1 + at @ np.linalg.inv(design.T @ design) @ at))
    for bound, chance in ((t * error, 0.025), (-t * error, 0.975), (0.0, 0.5)):
        found = overtaking(looks.tolist(), scores.tolist(), [other], float(at @ line + bound))
        assert found == [pytest.approx(chance if degrees + 2 >= LINE else 1.0, abs=1e-5)]


def test_too_few_finished_or_all_alike_say_nothing() -> None:
    assert overtaking([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.0], 0.9) == [1.0]
    assert overtaking([0.2] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.2], 0.9) == [1.0, 1.0]


# --- Feynman-Kac -------------------------------------------------------------------------------------------------


def test_resampling_is_systematic_and_survivors_keep_their_slots() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        shares = torch.rand(9, generator=rng, dtype=torch.float64).pow(4)
        shares = shares / shares.sum()
        origins = resampled(shares, float(torch.rand((), generator=rng)))
        assert len(origins) == 9
        for index in range(9):
            number = origins.count(index)
            assert math.floor(9 * shares[index]) <= number <= math.ceil(9 * shares[index])
            assert number == 0 or origins[index] == index
    # on average each has N times its share
    shares = torch.tensor([0.5, 0.05, 0.15, 0.3], dtype=torch.float64)
    numbers = torch.zeros(4)
    for k in range(1000):
        numbers += torch.bincount(torch.tensor(resampled(shares, (k + 0.5) / 1000)), minlength=4)
    assert torch.allclose(numbers / 1000, 4 * shares.float(), atol=0.01)


def test_a_copy_shares_its_past_and_goes_on_by_itself(tiny: TextToImage) -> None:
    request = replace(NOISY, prompt="a star", seed=5, keep=None, search=FeynmanKac(rungs=(0.5,), strength=200.0))
    x0: dict[tuple[int, int], Tensor] = {}

    def look(step: Step) -> None:
        if step.stage == "decoder":
            x0.update(
                {(seed, STEPS - left): x for seed, left, x in zip(step.seeds, step.steps_left, step.x0, strict=True)}
            )

    result = tiny.paint([request], callback=look)[0]
    paths = {seed: record.get("noise_path") for seed, record in zip(result.seeds, result.records, strict=True)}
    assert sorted(paths) == list(range(5, 13))
    copies = {seed: path[0]["seed"] for seed, path in paths.items() if path}
    assert copies and all(paths[source] is None for source in copies.values())
    assert all(path == [{"seed": path[0]["seed"], "steps": 5, "share": 0.0}] for path in paths.values() if path)
    for seed, source in copies.items():
        assert torch.allclose(x0[seed, 6], x0[source, 6], atol=1e-4)  # asked where both stood, before fresh noise
        assert not torch.allclose(x0[seed, 8], x0[source, 8], atol=1e-2)


def test_with_equal_scores_nothing_is_copied(tiny: TextToImage) -> None:
    plain, steered = (
        tiny.paint([replace(NOISY, search=search, keep=None)])[0] for search in (BestOf(), FeynmanKac(strength=1e-6))
    )
    assert all("noise_path" not in record for record in steered.records)
    assert steered.seeds == plain.seeds and (steered.images - plain.images).abs().max() <= LEVEL


# --- zero-order --------------------------------------------------------------------------------------------------


def test_a_round_begins_near_the_best_so_far(tiny: TextToImage) -> None:
    request = replace(ASKED, prompt="a star", seed=5, keep=None, search=ZeroOrder(rounds=4, share=0.3))
    result = tiny.paint([request])[0]
    scores = {each.seed: each.score for each in result.candidates}
    paths = {seed: record.get("noise_path") for seed, record in zip(result.seeds, result.records, strict=True)}
    for first in (7, 9, 11):  # two candidates in a round
        leader = max(range(5, first), key=lambda seed: scores[seed])  # type: ignore[arg-type,return-value]
        expected = [*(paths[leader] or []), {"seed": leader, "steps": 0, "share": 0.3}]
        assert paths[first] == paths[first + 1] == expected
    assert paths[5] is None and paths[6] is None


def test_turned_noise_is_unit_noise_near_its_origin(tiny: TextToImage) -> None:
    from gen.candidate import Candidate
    from gen.edit import first_noise
    from gen.settings import Settings
    from samplers.noise import noise

    shape = (4, 64, 64)
    candidate = Candidate(prompt="", seed=3, settings=Settings(), noise_path=(Before(1, 0, 0.6), Before(2, 0, 0.6)))
    x = first_noise(candidate, shape)
    assert x is not None and x.std() == pytest.approx(1, abs=0.03) and x.mean().abs() < 0.03
    for seed, part in ((1, 0.64), (2, 0.48), (3, 0.6)):
        origin = noise([seed], "decoder", 0, shape)[0]
        assert float((x * origin).mean()) == pytest.approx(part, abs=0.03)


# --- budget ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass where the networks work: each evaluation, decode and score takes a while."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def of(self, function: Callable[..., Tensor], seconds: float) -> Callable[..., Tensor]:
        def call(given: Tensor, *rest: Any) -> Tensor:
            self.now += seconds * len(given)
            return function(given, *rest)

        return call


EVALUATION, DECODE = 0.05, 0.5  # seconds
ONE = 2 * STEPS * EVALUATION + DECODE  # a candidate, alone: 1.5 seconds


@pytest.fixture
def timed(tiny: TextToImage) -> tuple[TextToImage, Clock]:
    """A model whose work takes seconds of a clock of its own; its memory is measured already."""
    clock = Clock()
    model = altered(tiny, call=clock.of(tiny.model.call, EVALUATION), decode=clock.of(tiny.model.decode, DECODE))
    model.paint([replace(ASKED, prior=False)])
    clock.now = 0.0
    return model, clock


def spent(timed: tuple[TextToImage, Clock], request: Request) -> tuple[Result, float]:
    model, clock = timed
    engine = Engine(model.model, model._result, buckets=model._buckets, clock=clock)
    began = clock.now
    future = engine.submit(request)
    run(engine)
    return future.result(timeout=0), clock.now - began


BUDGETED = replace(ASKED, prompt="a star", seed=5, num_images_per_prompt=None, prior=False, keep=1)


@pytest.mark.parametrize("seconds", [3.1, 7.0, 16.0, 40.0])
def test_as_many_candidates_are_painted_as_fit(timed: tuple[TextToImage, Clock], seconds: float) -> None:
    result, took = spent(timed, replace(BUDGETED, budget=seconds))
    painted = [each for each in result.candidates if each.painted]
    assert 0.75 * seconds - ONE < took <= seconds and len(painted) == round(took / ONE)
    assert result.scores == [max(each.score for each in painted)]  # type: ignore[type-var]
    assert result.account.decodes == result.account.scores == len(painted)


@pytest.mark.parametrize("seconds", [0.001, 0.3, 1.2])
def test_a_budget_too_small_for_one_paints_one(timed: tuple[TextToImage, Clock], seconds: float) -> None:
    result, took = spent(timed, replace(BUDGETED, budget=seconds, keep=3))
    assert len(result.images) == 1 and took <= ONE + 1e-9


def test_waiting_for_room_is_spent_from_a_budget(timed: tuple[TextToImage, Clock]) -> None:
    model, clock = timed
    engine = Engine(model.model, model._result, max_rows=16, buckets=model._buckets, clock=clock)
    first, late = engine.submit(replace(ASKED, prior=False)), engine.submit(replace(BUDGETED, budget=7.0))
    run(engine)
    assert len(first.result(timeout=0).images) == 4 and clock.now > 16 * ONE
    assert [each.painted for each in late.result(timeout=0).candidates].count(True) == 1
    alone, _ = spent(timed, replace(BUDGETED, budget=7.0))
    assert [each.painted for each in alone.candidates].count(True) > 1


@pytest.mark.parametrize("search", ["best_of", "halving", "draft", "racing"])
@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_a_budget_is_overrun_by_a_step_at_most_once_something_is_painted(
    timed: tuple[TextToImage, Clock], search: str, slow: float
) -> None:
    """Also where the work becomes slower than it was measured to be."""
    model, clock = timed
    fast = model.model.call

    def call(x: Tensor, *rest: Any) -> Tensor:
        if clock.now > 5:
            clock.now += (slow - 1) * EVALUATION * len(x)
        return fast(x, *rest)

    vars(model.model)["call"] = call
    result, took = spent((model, clock), replace(BUDGETED, budget=12.0, search=search, keep=2))
    step = 2 * 16 * slow * EVALUATION
    assert took <= 12.0 + step + 16 * DECODE * (slow == 1.0)
    painted = sum(each.painted for each in result.candidates)
    assert painted >= (2 if slow == 1.0 else 1)  # a round that the slowness hits is lost


@pytest.mark.parametrize("search", ["best_of", "halving", "draft", "zero_order"])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("ticks", range(0, 16, 3))
def test_whenever_time_is_over_each_prompt_has_a_picture(
    tiny: TextToImage, plain: dict[int, Tensor], search: str, prior: bool, ticks: int
) -> None:
    """The deadline falls into every stage of a search of which nothing is painted yet."""
    clock = Clock()
    engine = Engine(tiny.model, tiny._result, max_rows=5, clock=clock)
    asked = {"search": search, "prior": prior, "budget": 100.0, "keep": 2}
    future = engine.submit(replace(ASKED, **asked))  # type: ignore[arg-type]
    for _ in range(ticks):
        engine.tick()
    clock.now = 101.0
    run(engine)
    result = future.result(timeout=0)
    assert set(result.prompts) == set(ASKED.prompt or ())
    for image, record in zip(result.images, result.records, strict=True):
        assert (tiny.repaint(record) - image).abs().max() <= LEVEL


def test_of_a_search_cut_short_the_nearest_picture_is_finished(tiny: TextToImage) -> None:
    """A draft that is under way is no picture: the candidate is painted from the beginning."""
    for search in (Halving(rungs=(0.5,)), Draft(steps=0.5), "best_of"):
        clock = Clock()
        engine = Engine(tiny.model, tiny._result, clock=clock)
        future = engine.submit(replace(ASKED, prior=False, search=search, budget=100.0))
        for _ in range(3):
            engine.tick()
        clock.now = 101.0
        engine.tick()
        assert len(engine._stages.rows["decoder"].live) == 2  # of two prompts
        run(engine)
        assert len(future.result(timeout=0).images) == 2


# --- diverse -----------------------------------------------------------------------------------------------------


def test_near_copies_are_passed_over() -> None:
    one, other, third = torch.eye(3)
    ranked = torch.stack([one, one + 0.01 * other, other, one - 0.01 * third, other + 0.02 * one, third])
    assert diverse_first(ranked, 3) == [0, 2, 5]
    assert diverse_first(ranked, 2) == [0, 2]
    assert diverse_first(ranked, 4) == [0, 1, 2, 5]  # there is no fourth, so the best of the others follows
    assert diverse_first(ranked, 6) == [0, 1, 2, 3, 4, 5]
    assert diverse_first(one.expand(4, 3), 2) == [0, 1]
    assert diverse_first(ranked[:1], 3) == [0]


def test_thousands_of_pictures_have_a_quartile() -> None:
    """6000 of them have more pairs than torch.quantile takes."""
    rng = torch.Generator().manual_seed(0)
    chosen = diverse_first(torch.randn(6000, 4, generator=rng), 3)
    assert chosen[0] == 0 and len(chosen) == 3


def test_diverse_keeps_other_pictures_and_the_best(tiny: TextToImage) -> None:
    request = replace(ASKED, num_images_per_prompt=12, keep=3, seed=9, prompt="a star")
    plain, diverse = tiny.paint([request])[0], tiny.paint([replace(request, diverse=True)])[0]
    everything = tiny.paint([replace(request, keep=None)])[0]
    clip = tiny.model.clip
    assert clip is not None
    with torch.no_grad():
        embeddings = clip.image((everything.images * 255).round() / 255)
    assert diverse.seeds == [everything.seeds[index] for index in diverse_first(embeddings, 3)]
    assert diverse.seeds[0] == plain.seeds[0] and diverse.seeds != plain.seeds
    assert diverse.scores == sorted(diverse.scores or [], reverse=True)


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"search": object()}, "search is object, which is none that was made; give one, or a name: best_of, draft"),
        ({"search": Halving}, "search is Halving, which is none that was made"),
        ({"search": "best"}, "search 'best' is unknown; choose from: best_of, draft, feynman_kac, halving"),
        ({"budget": 0}, "budget=0 is out of range; give a number of seconds above 0"),
        ({"budget": -1.5}, "budget=-1.5 is out of range; give a number of seconds above 0"),
        ({"budget": True}, "budget=True is of type bool; give a number of seconds above 0"),
        ({"budget": math.inf}, "budget=inf is out of range"),
        ({"search": "halving", "keep": None, "rerank": False}, "search 'halving' goes by CLIP's scores"),
        ({"search": "halving", "keep": 8}, "search 'halving' gives candidates up, but keep=8 of 8 keeps them all"),
        ({"search": "draft", "keep": None}, "search 'draft' gives candidates up, but keep=8 of 8"),
        ({"search": "racing", "keep": None}, "search 'racing' gives candidates up"),
        ({"search": "feynman_kac"}, "search 'feynman_kac' copies pictures .* give eta above 0"),
        ({"search": "zero_order", "latents": torch.zeros(16, 4, 8, 8)}, "draws its own noise; leave latents out"),
        ({"diverse": True, "keep": None}, "diverse=True chooses among candidates, but all are kept"),
        ({"diverse": "yes"}, "diverse='yes'; give True or False"),
        ({"keep": 5000, "num_images_per_prompt": None, "budget": 1.0}, "keep=5000 is more than num_images_per_prompt"),
    ],
)
def test_mistakes_are_told_before_any_work(counted: Counted, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        counted.model.paint([replace(ASKED, **words)])
    assert "\n" not in str(raised.value) and not counted.seen


@pytest.mark.parametrize(
    "make",
    [
        lambda: Halving(rungs=(0.0,)),
        lambda: Halving(goes_on=1.0),
        lambda: Draft(steps=1.5),
        lambda: Draft(goes_on=-0.1),
        lambda: Racing(rung=1.0),
        lambda: Racing(wave=0),
        lambda: FeynmanKac(rungs=(2.0,)),
        lambda: ZeroOrder(share=0.0),
        lambda: ZeroOrder(rounds=0),
    ],
)
def test_a_search_refuses_what_makes_no_sense(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="out of range; give"):
        make()


@pytest.mark.parametrize(
    "path",
    [
        None,
        [{"seed": 1}],
        ["seed"],
        [{"seed": -1, "steps": 1, "share": 0.0}],
        [{"seed": 1, "steps": 1, "share": 2.0}],
    ],
)
def test_a_damaged_noise_path_is_refused(tiny: TextToImage, path: Any) -> None:
    record = tiny.paint([replace(ASKED, prompt="a star", seed=1)])[0].records[0] | {"noise_path": path}
    with pytest.raises(ValueError, match=r"noise_path|out of range"):
        tiny.repaint(record)


# --- searches of one's own ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A search that a test writes."""

    moves: Callable[[Field], Moves]
    name = "own"

    def check(self, asked: Any) -> None:
        pass

    def __call__(self, field: Field) -> Moves:
        return self.moves(field)


def test_a_search_of_ones_own_sees_and_asks(tiny: TextToImage) -> None:
    seen: list[Any] = []

    def moves(field: Field) -> Moves:
        first, *others = field.candidates
        seen.extend([field.keep, field.num_steps, field.seconds_left(), field.scores])
        yield Go([first])
        seen.append(list(field.scores))
        yield Go(others, until=9)
        field.drop(others[1:])
        yield Go(others[:1])

    result = tiny.paint([replace(ASKED, prompt="a star", seed=3, prior=False, search=Own(moves))])[0]
    assert seen == [2, STEPS, math.inf, {}, [0]]
    assert [each.painted for each in result.candidates] == [True, True] + [False] * 6
    assert result.account.evaluations["decoder"] == 2 * (10 + 7 * 9 + 1)


def drops_everything(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop(field.candidates)


def takes_the_dropped(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop(field.candidates[1:])
    yield Go(field.candidates)


def goes_back(field: Field) -> Moves:
    yield Go(field.candidates, until=5)
    yield Go(field.candidates, until=4)


def drops_the_painted(field: Field) -> Moves:
    yield Go(field.candidates)
    field.drop(field.candidates)


def names_nobody(field: Field) -> Moves:
    yield Go([100])


def drafts_the_begun(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    yield Scout(field.candidates, 2)


def branches_the_painted(field: Field) -> Moves:
    yield Go(field.candidates)
    field.branch(field.candidates[0], field.candidates[1:])


def turns_the_begun(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.turn(field.candidates[0], field.candidates[1:], 0.5)


def names_twice(field: Field) -> Moves:
    yield Go([*field.candidates, field.candidates[0]], until=2)


def stops_at_the_end(field: Field) -> Moves:
    yield Go(field.candidates, until=field.num_steps)
    yield Go(field.candidates)


def drafts_in_no_steps(field: Field) -> Moves:
    yield Scout(field.candidates, 0)


def looks_at_nothing(field: Field) -> Moves:
    field.previews(field.candidates)
    yield Go(field.candidates)


def drops_anothers(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop([(field.candidates[0] + 8) % 16])
    yield Go(field.candidates)


def branches_to_the_dropped(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop(field.candidates[1:])
    field.branch(field.candidates[0], field.candidates[1:])
    yield Go(field.candidates[:1])


def will_not_end(field: Field) -> Moves:
    try:
        yield Go(field.candidates, until=2)
        field.drop([100])
    finally:
        yield Go(field.candidates)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (drops_everything, "gave up every candidate"),
        (takes_the_dropped, "takes candidate 1 on"),
        (goes_back, "which it has behind it"),
        (drops_the_painted, "which are given up or painted"),
        (names_nobody, r"names candidates \[100\]; give each once, of its own"),
        (names_twice, "give each once, of its own"),
        (stops_at_the_end, "takes candidates to step 10 of 10; leave until out"),
        (drafts_in_no_steps, "scouts in 0 steps; give 1 or more"),
        (looks_at_nothing, "looks at candidates .* which have not begun or are painted"),
        (drops_anothers, "give each once, of its own"),
        (branches_to_the_dropped, "which have not all halted"),
        (drafts_the_begun, "given up, painted or begun"),
        (branches_the_painted, "which have not all halted"),
        (turns_the_begun, "of these some have begun"),
    ],
)
def test_a_search_that_asks_for_nonsense_fails_its_request_alone(
    tiny: TextToImage, moves: Callable[[Field], Moves], message: str
) -> None:
    engine = tiny.engine()
    other = engine.submit(replace(ASKED, search="halving"))
    gone = engine.submit(replace(ASKED, search=Own(moves)))
    run(engine)
    with pytest.raises(ValueError, match=message):
        gone.result(timeout=0)
    assert len(other.result(timeout=0).images) == 4
    assert not engine._stages.rows["decoder"].live


@pytest.mark.parametrize("way", ["cancelled", "refused"])
def test_a_search_that_will_not_end_is_let_go(tiny: TextToImage, way: str) -> None:
    """Neither its request's end nor the engine's waits for it, or fails by it."""
    engine = tiny.engine()
    other = engine.submit(replace(ASKED, search="halving"))

    def refuse(step: Step) -> None:
        if way == "refused" and step.stage == "decoder":
            step.cancel()

    gone = engine.submit(replace(ASKED, search=Own(will_not_end)), callback=refuse)
    engine.tick()
    if way == "cancelled":
        assert gone.cancel()
    run(engine)
    assert gone.done() and len(other.result(timeout=0).images) == 4


def test_noise_that_was_handed_in_is_not_turned(tiny: TextToImage) -> None:
    def turns(field: Field) -> Moves:
        field.turn(field.candidates[0], field.candidates[1:], 0.5)
        yield Go(field.candidates)

    asked = replace(ASKED, prior=False, latents=torch.zeros(16, 4, 8, 8), search=Own(turns))
    with pytest.raises(ValueError, match="leave latents out"):
        tiny.paint([asked])


def test_a_request_with_a_search_is_held_by_nobody_once_it_is_done(tiny: TextToImage) -> None:
    """Without the garbage collector, however it ends; so its latents are gone with it."""
    engine = tiny.engine()
    gc.collect()
    gc.disable()
    try:
        futures = [engine.submit(request) for request in [*CHOOSING.values(), *MAKING.values()]]
        futures.append(engine.submit(replace(ASKED, search="halving", num_inference_steps=900)))
        flights = [weakref.ref(flight) for flight in engine._unsettled.values()]
        for _ in range(8):
            engine.tick()
        futures[-1].cancel()
        run(engine)
        assert all(future.done() for future in futures)
        assert [flight() for flight in flights] == [None] * len(flights)
    finally:
        gc.enable()


def test_all_are_there_by_name() -> None:
    assert sorted(SEARCHES) == ["best_of", "draft", "feynman_kac", "halving", "racing", "zero_order"]
