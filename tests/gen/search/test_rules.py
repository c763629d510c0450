"""How each search chooses, which candidates it copies and which noise it turns."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gen import Request, Step, TextToImage
from gen.candidate import Candidate, NoiseSegment
from gen.edit import first_noise
from gen.search import SEARCHES, BestOf, Draft, FeynmanKac, Halving, Racing, ZeroOrder
from gen.search.rules import LINE, overtaking, resampled
from gen.settings import Settings
from samplers.noise import noise
from tests.gen.search.asked import ASKED, NOISY, STEPS
from tests.pictures import LEVEL


def test_all_are_there_by_name() -> None:
    assert sorted(SEARCHES) == ["best_of", "draft", "feynman_kac", "halving", "racing", "zero_order"]


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
    shape = (4, 64, 64)
    candidate = Candidate(
        prompt="", seed=3, settings=Settings(), noise_path=(NoiseSegment(1, 0, 0.6), NoiseSegment(2, 0, 0.6))
    )
    x = first_noise(candidate, shape)
    assert x is not None and x.std() == pytest.approx(1, abs=0.03) and x.mean().abs() < 0.03
    for seed, part in ((1, 0.64), (2, 0.48), (3, 0.6)):
        origin = noise([seed], "decoder", 0, shape)[0]
        assert float((x * origin).mean()) == pytest.approx(part, abs=0.03)
