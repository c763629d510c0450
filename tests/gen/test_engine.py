"""Requests in flight: each is answered as if it were alone, whatever joins, leaves or goes wrong beside it."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gen import Cancelled, Engine, Interrupted, Request, Result, Step, TextToImage
from gen.bucket import FEW, Bucket, Buckets
from gen.conditioning import MOST_TEXTS, Condition, Conditions
from gen.flight import DECODER, PRIOR, Account, Flight, Painted, place_of
from gen.request import Job
from gen.resolve import resolve
from gen.row import Live, Row
from gen.search import Field, Go, Moves
from samplers.sample import SAMPLERS
from samplers.state import State
from tests.engines import altered, buckets_of, run

LEVEL = 1 / 255  # one 8-bit level
SECONDS = 120  # a wait that should never be needed

PLAIN = Request(prompt="a small red circle", seed=7, rerank=False, output_type="latent")
KINDS = [
    PLAIN,
    replace(PLAIN, prompt="a large blue square", seed=1, num_images_per_prompt=3),
    replace(PLAIN, guidance_scale=1.0, num_inference_steps=7),
    replace(PLAIN, guidance_scale=7.5, num_inference_steps=2, negative_prompt="a star"),
    replace(PLAIN, prompt=["a star", "a red square"], sampler="heun", num_inference_steps=3),
    replace(PLAIN, eta=0.7, noise_level=300, prior_guidance_scale=4.0),
    replace(PLAIN, prior=False, guidance_rescale=0.7, num_images_per_prompt=2),
    replace(PLAIN, height=32, width=96, guidance_interval=(0.5, 5.0)),
    replace(PLAIN, sampler="dpmpp_2m_sde", num_inference_steps=5, prior_num_inference_steps=6),
    replace(PLAIN, prompt=None, image_embeds=torch.ones(1, 16), sampler="unipc", num_inference_steps=4),
]


Latents = dict[int, Tensor]


def latents_of(job: Job, painted: Mapping[int, Painted], account: Account) -> Latents:
    return {index: each.latents for index, each in painted.items()}


def engine_of(model: TextToImage, **settings: Any) -> Engine[Latents]:
    return Engine(model.model, latents_of, **settings)


def alone(model: TextToImage, request: Request) -> Latents:
    engine = engine_of(model)
    future = engine.submit(request)
    run(engine)
    return future.result(timeout=0)


def same(ours: Latents, theirs: Latents, within: float = 1e-5) -> bool:
    return ours.keys() == theirs.keys() and all(
        (x - theirs[index]).abs().max() <= within * theirs[index].abs().max().clamp(min=1) for index, x in ours.items()
    )


def decoder_rows(engine: Engine[Any]) -> list[Live]:
    return engine._stages.rows["decoder"].live


@pytest.fixture(scope="module")
def expected(tiny: TextToImage) -> list[Latents]:
    """Of every kind of request, painted by itself."""
    return [alone(tiny, request) for request in KINDS]


# --- one request does not notice another -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_picture_is_the_same_whatever_else_runs(tiny: TextToImage, expected: list[Latents], seed: int) -> None:
    """Requests of every kind join at any tick, some are cancelled, some fail, at several limits."""
    draw = random.Random(seed)
    engine = engine_of(tiny, max_rows=draw.choice([None, 2, 5]), buckets=draw.choice([None, buckets_of(3)]))
    waiting = [draw.randrange(len(KINDS)) for _ in range(16)]
    futures: list[tuple[int, Future[Latents]]] = []
    cancelled, failing = set[Future[Latents]](), set[Future[Latents]]()
    while waiting or engine.tick():
        for _ in range(min(draw.choice([0, 0, 1, 2]), len(waiting))):
            kind = waiting.pop()
            fails = draw.random() < 0.15
            future = engine.submit(KINDS[kind], callback=refuse if fails else None)
            futures.append((kind, future))
            failing |= {future} if fails else set()
        if futures and draw.random() < 0.1:
            _, future = draw.choice(futures)
            cancelled |= {future} if future.cancel() else set()
        if waiting:
            engine.tick()
    assert len(futures) == 16 and len(failing | cancelled) < 16
    for kind, future in futures:
        if future in cancelled:
            assert future.cancelled()
        elif future in failing:
            assert isinstance(future.exception(timeout=0), Refused)
        else:
            assert same(future.result(timeout=0), expected[kind])
    other = alone(tiny, replace(PLAIN, seed=8))
    assert not same(other, expected[0])


class Thinning:
    """A search that gives up every other candidate on the way, whatever they score."""

    name = "thinning"

    def check(self, asked: Any) -> None:
        pass

    def __call__(self, field: Field) -> Moves:
        yield Go(field.candidates, until=2)
        field.drop(field.candidates[1::2])
        yield Go(field.candidates[::2], until=3)
        yield Go(field.candidates[::2])


def drawn(draw: random.Random) -> Request:
    """A request with settings of every kind."""
    several: dict[str, Any] = {"num_images_per_prompt": 4, "keep": 2, "rerank": True, "search": Thinning()}
    return replace(
        PLAIN,
        prompt=draw.choice(["a star", "a small red circle", "a large blue square"]),
        seed=draw.randrange(2**32 - 8),
        width=draw.choice([None, None, 96]),
        num_inference_steps=draw.randint(4, 8),
        guidance_scale=draw.choice([1.0, 2.0, 7.0]),
        guidance_rescale=draw.choice([None, 0.5]),
        guidance_interval=draw.choice([None, (0.5, 5.0)]),
        guidance_rule=draw.choice([None, "apg", "cfg_zero"]),
        clip_guidance_scale=draw.choice([None, None, 0.1]),  # at 2 this CLIP makes 1e-2 of 1e-7
        negative_prompt=draw.choice([None, "a circle"]),
        sampler=draw.choice([None, *sorted(SAMPLERS)]),
        prior=draw.random() < 0.5,
        **draw.choice([{}, {"num_images_per_prompt": 2}, several]),
    )


@pytest.mark.filterwarnings("ignore:.* is ignored")
@pytest.mark.parametrize("seed", range(4))
def test_requests_of_any_settings_do_not_notice_each_other(tiny: TextToImage, seed: int) -> None:
    """They join at any tick, some are cancelled and some give candidates up on the way, at several limits."""
    draw = random.Random(seed)
    waiting = [drawn(draw) for _ in range(7)]
    engine = engine_of(tiny, max_rows=draw.choice([None, 3]), buckets=draw.choice([None, buckets_of(3)]))
    asked: list[tuple[Request, Future[Latents]]] = []
    while waiting or engine.tick():
        if waiting and draw.random() < 0.4:
            request = waiting.pop()
            asked.append((request, engine.submit(request)))
        if asked and draw.random() < 0.03:
            draw.choice(asked)[1].cancel()
        if waiting:
            engine.tick()
    done = [(request, future) for request, future in asked if not future.cancelled()]
    assert len(asked) == 7 and len(done) >= 4
    for request, future in done:  # some settings make more of the last bits, which batches may differ in
        assert same(future.result(timeout=0), alone(tiny, request), within=1e-4)


class Refused(Exception):
    """A callback's own error."""


def refuse(step: Step) -> None:
    if step.stage == "decoder" and step.steps_left[0] == 1:
        raise Refused("no more")


def test_pictures_and_scores_are_those_of_a_plain_call(tiny: TextToImage) -> None:
    asked = [
        Request(prompt="a star", seed=4, num_images_per_prompt=5, keep=2, output_type="pt"),
        Request(prompt=["a red circle", "a square"], seed=2, num_images_per_prompt=2, output_type="pt", prior=False),
        Request(prompt="a star", seed=9, rerank=False, output_type="pt", height=32),
    ]
    plain = [tiny.paint([request])[0] for request in asked]
    with tiny.engine() as engine:
        together = [future.result(SECONDS) for future in [engine.submit(request) for request in asked]]
    for ours, theirs in zip(together, plain, strict=True):
        assert ours.seeds == theirs.seeds and (ours.images - theirs.images).abs().max() <= LEVEL
        assert ours.scores == (None if theirs.scores is None else pytest.approx(theirs.scores, abs=1e-3))
        assert (ours.account.evaluations, ours.account.decodes) == (theirs.account.evaluations, theirs.account.decodes)


def test_many_threads_submit_at_once(tiny: TextToImage, expected: list[Latents]) -> None:
    found: dict[int, Latents] = {}
    with engine_of(tiny) as engine:

        def ask(kind: int) -> None:
            found[kind] = engine.submit(KINDS[kind]).result(SECONDS)

        threads = [threading.Thread(target=ask, args=[kind]) for kind in range(len(KINDS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert sorted(found) == list(range(len(KINDS)))
    assert all(same(found[kind], expected[kind]) for kind in found)


def test_the_prior_of_a_late_request_runs_beside_the_decoder_of_an_early_one(tiny: TextToImage) -> None:
    engine = engine_of(tiny)
    stages: list[tuple[str, str]] = []
    early = engine.submit(PLAIN, callback=lambda step: stages.append(("early", step.stage)))
    run(engine, ticks=4)  # three steps of the prior; the embedding is finished and painted on in the third
    late = engine.submit(replace(PLAIN, seed=1), callback=lambda step: stages.append(("late", step.stage)))
    stages.clear()
    engine.tick()
    assert stages == [("late", "prior"), ("early", "decoder")]
    run(engine)
    assert early.done() and late.done()


def test_a_request_is_answered_as_soon_as_it_is_done(tiny: TextToImage, expected: list[Latents]) -> None:
    engine = engine_of(tiny)
    long = engine.submit(replace(PLAIN, num_inference_steps=12, prior=False))
    run(engine, ticks=2)
    short = engine.submit(replace(KINDS[3], prior=False))
    run(engine, ticks=2)
    assert short.done() and not long.done()
    run(engine)
    assert long.done()


def test_requests_that_say_the_same_are_told_the_same(tiny: TextToImage) -> None:
    """Two requests in flight with one prompt and one null: one text each, encoded once."""
    read: list[int] = []
    hook = tiny.model.text.encoder.register_forward_hook(lambda module, given, out: read.append(len(given) or 1))
    engine = engine_of(tiny)
    for seed in (1, 2):
        engine.submit(replace(PLAIN, prompt="a green star", seed=seed, prior=False, num_images_per_prompt=2))
    engine.tick()
    hook.remove()
    assert len(read) <= 2  # the prompt, and the empty one where this model has not read it before
    told = {condition for one in decoder_rows(engine) for condition in (one.row.prompt, one.row.null)}
    assert len(decoder_rows(engine)) == 4 and len(told) == 2
    run(engine)


# --- room --------------------------------------------------------------------------------------------------------


def test_no_more_rows_are_in_flight_than_were_allowed(tiny: TextToImage, expected: list[Latents]) -> None:
    engine = engine_of(tiny, max_rows=3)
    futures = [engine.submit(request) for request in KINDS]
    seen = []
    while engine.tick():
        seen.append(sum(len(rows.live) for rows in engine._stages.rows.values()))
    assert max(seen) == 3
    assert all(same(future.result(timeout=0), theirs) for future, theirs in zip(futures, expected, strict=True))


def test_requests_wait_their_turn_once_a_call_is_full(tiny: TextToImage) -> None:
    """First come, first served, and whole: two candidates with guidance are four evaluations, of which three fit."""
    engine = engine_of(tiny, buckets=buckets_of(3))
    request = replace(PLAIN, prior=False, num_images_per_prompt=2)
    first, second = engine.submit(request), engine.submit(replace(request, seed=1))
    engine.tick()
    assert len(decoder_rows(engine)) == 2
    run(engine, ticks=3)
    assert first.done() and not second.done()
    run(engine)
    assert same(second.result(timeout=0), alone(tiny, replace(request, seed=1)))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("room", [8, None])
def test_rows_of_one_request_come_in_as_memory_allows(tiny: TextToImage, prior: bool, room: int | None) -> None:
    """Many prompts of four: in flight are as many as a call has room for, and as many again in the prior."""
    prompts = [f"a star number {k}" for k in range(40 if room is None else 30)]
    request = replace(PLAIN, prompt=prompts, num_images_per_prompt=4, num_inference_steps=2, prior=prior)
    request = replace(request, prior_num_inference_steps=3 if prior else None)
    engine = engine_of(tiny, buckets=None if room is None else buckets_of(room))
    future, seen, held = engine.submit(request), list[int](), list[int]()
    engine.tick()
    following = engine.submit(replace(PLAIN, seed=9))
    while not future.done():
        if 0 in engine._flights:
            flight = engine._flights[0]
            assert len(engine._flights) == 1 or not flight.waiting
            live = [one for rows in engine._stages.rows.values() for one in rows.live]
            seen.append(sum(place_of(one.row).request == 0 for one in live))
            held.append(len(flight.told))
        engine.tick()
    most = (FEW if room is None else room) // 2  # guided, a row is two evaluations
    assert most <= max(seen) <= most * (1 + prior)
    assert held == sorted(held, reverse=True) and held[-1] < held[0]  # let go of with the search of their prompt
    run(engine)
    some = replace(request, prompt=prompts[20])
    assert same({k: future.result(timeout=0)[20 * 4 + k] for k in range(4)}, alone(tiny, some))
    assert same(following.result(timeout=0), alone(tiny, replace(PLAIN, seed=9)))


def test_a_priors_answers_count_as_the_pictures_they_become(kandinskys: dict[str, TextToImage]) -> None:
    """Several answers and a null for each: the decoder's calls are full all the same, and do not wait for all."""
    model, device = kandinskys["2.2"], torch.device("cpu")
    asked: dict[str, Any] = {"negative_prompt": "blue", "prior_best_of": 3, "prior_num_inference_steps": 4}
    asked |= {"num_images_per_prompt": 24, "num_inference_steps": 4, "rerank": False, "seed": 1}
    job = resolve(Request(prompt="a star", **asked), model.model.abilities)
    shape = model.model.latent_shape(job.candidates[0].settings)
    buckets = Buckets({("decoder", shape, device): Bucket("decoder", device, 16, ceiling=16)})
    engine, seen, most_thinking = (
        Engine(model.model, lambda job, painted, account: len(painted), buckets=buckets),
        [],
        0,
    )
    future = engine.submit(job)
    while engine.tick():
        seen.append(engine._stages.rows[DECODER].num_evaluations(shape))
        most_thinking = max(most_thinking, len(engine._stages.rows[PRIOR].live))
    assert future.result(timeout=0) == 24
    assert 0 < most_thinking <= 8 * 4  # eight pictures' worth, of three answers and a null
    assert max(seen) >= 16 and max(seen[:5]) >= 16


def test_the_best_of_some_are_painted_in_one_batch(tiny: TextToImage) -> None:
    for number in (16, 64):
        engine = engine_of(tiny)
        engine.submit(replace(PLAIN, num_images_per_prompt=number, prior=False))
        engine.tick()
        assert len(decoder_rows(engine)) == number


def test_a_full_call_keeps_no_picture_of_another_size_waiting(tiny: TextToImage) -> None:
    engine = engine_of(tiny, buckets=buckets_of(3))
    request = replace(PLAIN, prior=False, num_images_per_prompt=2)
    first, second, wide = (
        engine.submit(each) for each in (request, replace(request, seed=1), replace(request, width=96))
    )
    engine.tick()
    assert [one.row.shape for one in decoder_rows(engine)] == [(4, 8, 8)] * 2 + [(4, 8, 12)] * 2
    run(engine)
    assert all(
        same(future.result(timeout=0), alone(tiny, each))
        for future, each in ((first, request), (wide, replace(request, width=96)))
    )
    assert second.done()


def test_when_memory_runs_out_nobody_notices(tiny: TextToImage, expected: list[Latents]) -> None:
    refused: Counter[int] = Counter()

    def short(x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        if len(x) > 3:
            refused[len(x)] += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tiny.model.call(x, timestep, told)

    engine = engine_of(altered(tiny, call=short))
    futures = [engine.submit(request) for request in KINDS]
    run(engine)
    assert all(same(future.result(timeout=0), theirs) for future, theirs in zip(futures, expected, strict=True))
    assert refused and max(refused.values()) == 1  # no number of evaluations was tried twice


def test_when_memory_runs_out_over_pictures_fewer_are_decoded_at_once(tiny: TextToImage) -> None:
    sizes: list[int] = []

    def short(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
        return tiny.model.decode(latents)

    request = Request(prompt="a star", seed=1, num_images_per_prompt=7, output_type="pt", prior=False)
    ours, theirs = altered(tiny, decode=short).paint([request])[0], tiny.paint([request])[0]
    assert sizes == [2, 7, 3, 3, 1]  # the first is measured
    assert (ours.images - theirs.images).abs().max() <= LEVEL and ours.seeds == theirs.seeds


# --- cancelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ticks", [0, 1, 4])  # before it begins, in the prior, in the decoder
def test_a_cancelled_request_is_out_at_the_next_tick(tiny: TextToImage, expected: list[Latents], ticks: int) -> None:
    engine = engine_of(tiny)
    kept, gone = engine.submit(KINDS[1]), engine.submit(KINDS[5])
    run(engine, ticks)
    assert gone.cancel() and gone.cancelled()
    engine.tick()
    seeds = {one.row.seed for rows in engine._stages.rows.values() for one in rows.live}
    assert seeds == {1, 2, 3}
    assert wait([gone], timeout=0).done == {gone}
    with pytest.raises(CancelledError):
        gone.result(timeout=0)
    run(engine)
    assert same(kept.result(timeout=0), expected[1])
    assert not kept.cancel() and not kept.cancelled()  # too late


def test_a_request_can_be_cancelled_while_the_engine_runs_by_itself(tiny: TextToImage) -> None:
    begun = threading.Event()
    with engine_of(tiny) as engine:
        future = engine.submit(replace(PLAIN, num_inference_steps=900, prior=False), callback=lambda _: begun.set())
        assert begun.wait(SECONDS) and not future.done()
        assert future.cancel()
        assert wait([future], SECONDS).done
        assert engine.submit(KINDS[3]).result(SECONDS)


def test_a_callback_cancels_its_own_request(tiny: TextToImage, expected: list[Latents]) -> None:
    engine = engine_of(tiny)
    other = engine.submit(KINDS[1])
    gone = engine.submit(PLAIN, callback=lambda step: step.cancel() if step.stage == "decoder" else None)
    run(engine)
    with pytest.raises(Cancelled, match="cancelled in the decoder with 3 steps left"):
        gone.result(timeout=0)
    assert same(other.result(timeout=0), expected[1])


def test_in_one_call_for_many_requests_a_callback_ends_them_all(tiny: TextToImage) -> None:
    seen: list[int] = []

    def stop(step: Step) -> None:
        seen.extend(step.seeds)
        if step.stage == "decoder" and 3 in step.seeds:
            step.cancel()

    with pytest.raises(Cancelled):
        tiny.paint([replace(PLAIN, seed=seed) for seed in (2, 3, 4)], callback=stop)
    assert {2, 3} <= set(seen)


# --- failing -----------------------------------------------------------------------------------------------------


def test_texts_of_requests_that_come_together_are_read_together(tiny: TextToImage) -> None:
    """For the decoder once, for the prior once, and by CLIP once their pictures are there."""
    model, read = tiny.model, list[int]()
    tiny("a star", seed=1, prior=True)  # so that the empty prompt is known
    towers = [model.text.encoder, model.prior.text_encoder, model.clip.model]
    embeddings = {
        module for tower in towers for name, module in tower.named_modules() if name.endswith("token_embedding")
    }
    hooks = [each.register_forward_hook(lambda module, given, out: read.append(len(out))) for each in embeddings]
    engine = tiny.engine()
    asked = [Request(prompt=f"a star number {seed}", seed=seed, output_type="pt", prior=True) for seed in range(3)]
    futures = [engine.submit(request) for request in asked]
    run(engine)
    for hook in hooks:
        hook.remove()
    assert read == [3, 3, 3]
    for future, request in zip(futures, asked, strict=True):
        assert (future.result(timeout=0).images - tiny.paint([request])[0].images).abs().max() <= LEVEL


def test_a_text_tower_is_asked_for_a_bounded_number_of_texts(tiny: TextToImage) -> None:
    """By the decoder, by the prior and by CLIP, of a request with many prompts."""
    model, read = tiny.model, list[int]()
    towers = [model.text.encoder, model.prior.text_encoder, model.clip.model]
    embeddings = {
        module for tower in towers for name, module in tower.named_modules() if name.endswith("token_embedding")
    }
    hooks = [each.register_forward_hook(lambda module, given, out: read.append(len(out))) for each in embeddings]
    prompts = [f"a star number {k}" for k in range(MOST_TEXTS + 3)]
    short = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "prior": True, "output_type": "pt"}
    many = tiny.paint([Request(prompt=prompts, seed=1, **short)])[0]
    for hook in hooks:
        hook.remove()
    assert sum(read) >= 3 * len(prompts) and max(read) == MOST_TEXTS
    (last,) = tiny.paint([Request(prompt=prompts[-1], seed=1, **short)])
    assert (many.images[-1] - last.images[0]).abs().max() <= LEVEL


def test_a_text_that_cannot_be_encoded_fails_its_request_alone(tiny: TextToImage, expected: list[Latents]) -> None:
    def tell(candidates: Sequence[Any], table: Any) -> Any:
        if any("zebra" in candidate.prompt for candidate in candidates):
            raise Refused("no zebras")
        return tiny.model.tell(candidates, table)

    engine = engine_of(altered(tiny, tell=tell))
    futures = [engine.submit(request) for request in (KINDS[1], replace(PLAIN, prompt="a zebra"), KINDS[5])]
    run(engine)
    assert isinstance(futures[1].exception(timeout=0), Refused)
    assert same(futures[0].result(timeout=0), expected[1]) and same(futures[2].result(timeout=0), expected[5])


def test_latents_that_cannot_be_decoded_fail_their_request_alone(tiny: TextToImage) -> None:
    """Three requests' pictures are decoded together; the one that cannot be is found."""
    asked = [replace(PLAIN, seed=seed, prior=False, output_type="pt") for seed in (1, 2, 3)]
    bad = alone(tiny, replace(asked[1], output_type="latent"))[0]
    sizes: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        if any(torch.allclose(each, bad, atol=1e-3) for each in latents):
            raise Refused("not this one")
        return tiny.model.decode(latents)

    engine = altered(tiny, decode=decode).engine()
    engine.submit(replace(asked[0], num_images_per_prompt=3, seed=50))  # measured by these
    run(engine)
    sizes.clear()
    futures = [engine.submit(request) for request in asked]
    run(engine)
    assert sizes == [3, 1, 1, 1]
    assert isinstance(futures[1].exception(timeout=0), Refused)
    for index in (0, 2):
        assert (futures[index].result(timeout=0).images - tiny.paint([asked[index]])[0].images).abs().max() <= LEVEL


def test_a_network_call_that_fails_takes_its_requests_along_and_no_others(
    tiny: TextToImage, expected: list[Latents]
) -> None:
    broken = True

    def call(x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        if broken and x.shape[2:] == (8, 8):
            raise Refused("a bad call")
        return tiny.model.call(x, timestep, told)

    engine = engine_of(altered(tiny, call=call))
    square, other, wide = (engine.submit(KINDS[kind]) for kind in (0, 1, 7))
    run(engine)
    assert isinstance(square.exception(timeout=0), Refused) and isinstance(other.exception(timeout=0), Refused)
    assert same(wide.result(timeout=0), expected[7])
    broken = False
    again = engine.submit(KINDS[0])
    run(engine)
    assert same(again.result(timeout=0), expected[0])


def test_what_goes_wrong_beside_a_call_ends_no_other_request(
    tiny: TextToImage, expected: list[Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a stage's own work all who are in it fail, and who comes later is painted."""
    for stage in ("prior", "decoder"):
        engine = engine_of(tiny)
        early = engine.submit(KINDS[0])
        run(engine, ticks=4)  # it is in the decoder
        late = engine.submit(KINDS[1])
        run(engine, ticks=1)
        broken = engine._stages.rows[stage]
        with monkeypatch.context() as patched:
            patched.setattr(broken, "tick", lambda: next(iter([])))
            engine.tick()
        assert not broken.live
        run(engine)
        failed, whole = (late, early) if stage == "prior" else (early, late)
        assert isinstance(failed.exception(timeout=0), StopIteration)
        assert same(whole.result(timeout=0), expected[1 if whole is late else 0])
        again = engine.submit(KINDS[0])
        run(engine)
        assert same(again.result(timeout=0), expected[0])


def test_a_request_that_leaves_where_there_is_no_memory_ends_no_engine(
    tiny: TextToImage, expected: list[Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(state: State, rows: Tensor) -> State:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = engine_of(tiny)
    gone, beside, other = (engine.submit(KINDS[kind]) for kind in (0, 1, 8))
    run(engine, ticks=5)
    gone.cancel()
    with monkeypatch.context() as patched:
        patched.setattr(State, "select", short)
        engine.tick()
    run(engine)
    assert isinstance(beside.exception(timeout=0), torch.OutOfMemoryError)
    assert same(other.result(timeout=0), expected[8])


def test_a_gradient_that_fails_takes_its_request_along_and_not_its_batch(
    tiny: TextToImage, expected: list[Latents]
) -> None:
    """Both ways: an error, and memory that runs out over one picture, which cannot be asked in smaller calls."""
    for error in (Refused("no slope"), torch.OutOfMemoryError("CUDA out of memory.")):

        def decode(latents: Tensor, error: Exception = error) -> Tensor:
            if torch.is_grad_enabled():
                raise error
            return tiny.model.decode(latents)

        engine = engine_of(altered(tiny, decode=decode))
        asked = [KINDS[0], replace(PLAIN, prompt="a star", clip_guidance_scale=9.0), KINDS[1]]
        first, steered, last = [engine.submit(request) for request in asked]
        run(engine)
        assert isinstance(steered.exception(timeout=0), Refused | MemoryError)
        assert same(first.result(timeout=0), expected[0]) and same(last.result(timeout=0), expected[1])


def test_what_cannot_be_painted_is_refused_at_once(tiny: TextToImage) -> None:
    engine = engine_of(tiny)
    with pytest.raises(ValueError, match="sampler 'eular' is unknown"):
        engine.submit(replace(PLAIN, sampler="eular"))
    assert not engine.tick()


# --- the end -----------------------------------------------------------------------------------------------------


def test_closing_finishes_what_is_in_flight(tiny: TextToImage, expected: list[Latents]) -> None:
    for started in (False, True):
        engine = engine_of(tiny)
        if started:
            engine.start()
        futures = [engine.submit(KINDS[kind]) for kind in (0, 1)]
        engine.close()
        assert same(futures[0].result(timeout=0), expected[0]) and same(futures[1].result(timeout=0), expected[1])
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.submit(PLAIN)
        engine.close()  # twice does no harm


def test_closing_may_cancel_what_is_in_flight(tiny: TextToImage) -> None:
    for started in (False, True):
        engine = engine_of(tiny)
        if started:
            engine.start()
        futures = [engine.submit(replace(PLAIN, num_inference_steps=900)) for _ in range(3)]
        engine.close(cancel=True)
        assert all(future.cancelled() for future in futures) and len(wait(futures, timeout=0).done) == 3


def test_an_error_inside_with_cancels(tiny: TextToImage) -> None:
    with pytest.raises(Refused), engine_of(tiny) as engine:
        future = engine.submit(replace(PLAIN, num_inference_steps=900))
        raise Refused
    assert future.cancelled()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_future_is_left_when_the_loop_itself_ends(tiny: TextToImage) -> None:
    """SystemExit is no request's own error; the engine's thread ends, and says so to all who wait."""

    def leave(step: Step) -> None:
        raise SystemExit("enough")

    engine = engine_of(tiny)
    futures = [engine.submit(PLAIN), engine.submit(KINDS[1], callback=leave), engine.submit(KINDS[2])]
    engine.start()
    for future in futures:
        assert isinstance(future.exception(SECONDS), SystemExit)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(PLAIN)
    engine.close()


def test_ctrl_c_ends_a_call_and_the_model_paints_on(tiny: TextToImage, expected: list[Latents]) -> None:
    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        tiny.paint([PLAIN, KINDS[1]], callback=interrupt)
    assert isinstance(caught.value, Interrupted) and caught.value.results() == [None, None]
    (result,) = tiny.paint([PLAIN])
    assert same(dict(enumerate(result.images)), expected[0])


@pytest.mark.parametrize("words", [{}, {"diverse": True}, {"rerank": False, "keep": None, "output_type": "latent"}])
def test_ctrl_c_leaves_what_was_painted(tiny: TextToImage, words: dict[str, Any]) -> None:
    """A budget's third round, of 16, is lost; the first two, of 1 and 4, are not, nor is another request."""

    def interrupt(step: Step) -> None:
        if len(step.seeds) == 16 and step.steps_left[0] == 1:
            raise KeyboardInterrupt

    plain = replace(PLAIN, prior=False)
    asked = replace(plain, **({"keep": 2, "rerank": None, "output_type": "pt"} | words))
    short, long = replace(plain, num_inference_steps=2), replace(plain, num_inference_steps=900)
    with pytest.raises(Interrupted) as caught:
        tiny.paint([replace(asked, budget=1000.0), short, long], callback=interrupt)
    result, other, none = caught.value.results()
    assert result is not None and other is not None and none is None
    expected = tiny.paint([replace(asked, num_images_per_prompt=5)])[0]
    assert result.seeds == expected.seeds and result.scores == pytest.approx(expected.scores)
    assert torch.allclose(result.images, expected.images, atol=LEVEL)
    assert [each.seed for each in result.candidates if each.painted] == [7, 8, 9, 10, 11]
    assert other.seeds == [7]


@pytest.mark.parametrize("words", [{}, {"rerank": False, "keep": None}])
def test_ctrl_c_leaves_what_waits_to_be_decoded(tiny: TextToImage, words: dict[str, Any]) -> None:
    """Pictures that have taken all of their steps are kept, though they are too few for a whole chunk."""
    seen: list[int] = []

    def interrupt(step: Step) -> None:
        seen.extend(step.seeds if step.steps_left[0] == 0 else [])
        if len(seen) == 8:
            raise KeyboardInterrupt

    asked = replace(PLAIN, **({"prior": False, "keep": 6, "rerank": None, "output_type": "pt"} | words))
    with pytest.raises(Interrupted) as caught:
        tiny.paint([replace(asked, num_images_per_prompt=8)], batch_size=2, callback=interrupt)
    (result,) = caught.value.results()
    assert result is not None
    expected = tiny.paint([replace(asked, num_images_per_prompt=6)])[0]
    assert result.seeds == expected.seeds and result.scores == pytest.approx(expected.scores)
    assert torch.allclose(result.images, expected.images, atol=LEVEL)
    assert caught.value.results()[0].seeds == result.seeds, "it can be asked for again"


def test_ctrl_c_while_a_call_ends_loses_nothing(tiny: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(engine: Engine[Result], *, cancel: bool = False) -> None:
        raise KeyboardInterrupt

    def interrupt(step: Step) -> None:
        if step.seeds == [9] and step.steps_left == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "close", interrupted)
    asked = replace(PLAIN, prior=False, num_images_per_prompt=3)
    assert len(tiny.paint([asked])[0].images) == 3
    with pytest.raises(Interrupted) as caught:
        tiny.paint([asked], batch_size=1, callback=interrupt)
    assert [result.seeds for result in caught.value.results() if result] == [[7, 8]]


def test_ctrl_c_while_requests_begin_resolves_them_all(tiny: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine()
    futures = [engine.submit(request) for request in KINDS[:3]]

    def interrupt(*given: Any) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    first = engine._stages.has_room  # asked again for the second, when the first is out of the queue
    asked = iter([first, interrupt])
    monkeypatch.setattr(engine._stages, "has_room", lambda *given: next(asked)(*given))
    with pytest.raises(KeyboardInterrupt):
        engine.tick()
    engine.close(cancel=True)
    assert all(future.cancelled() for future in futures)


def test_an_engine_in_its_own_thread_is_not_ticked_from_another(tiny: TextToImage) -> None:
    with engine_of(tiny) as engine, pytest.raises(RuntimeError, match="in a thread of its own"):
        engine.tick()
    with pytest.raises(RuntimeError, match="started before"):
        engine.start()


# --- what it leaves behind ---------------------------------------------------------------------------------------


def alive() -> Counter[str]:
    """Objects of a request that are still there."""
    gc.collect()
    kinds = (Condition, Conditions, Row, Live, Flight, Job, Future, Painted, Result)
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds or type(each) is Tensor)


def test_hundreds_of_requests_leave_nothing(tiny: TextToImage) -> None:
    short = [replace(PLAIN, num_inference_steps=2, prior_num_inference_steps=2)]
    short += [replace(short[0], prior=False), replace(short[0], sampler="heun", guidance_scale=1.0)]
    engine = tiny.engine()

    def paint(number: int) -> None:
        for index in range(number):
            future = engine.submit(replace(short[index % 3], prompt=f"a star number {index}", seed=index))
            if index % 7 == 0:
                future.cancel()
            if index % 4 == 0:
                run(engine)
        run(engine)

    paint(6)
    before = alive()
    paint(200)
    assert alive() == before


def test_a_request_that_is_done_is_held_by_nobody(tiny: TextToImage) -> None:
    """Without the garbage collector: what a request held is gone when its answer is."""
    tiny.paint([KINDS[0]])  # the model keeps the empty prompt from its first request on
    before = alive()
    gc.disable()
    try:
        engine = tiny.engine()
        for request in KINDS[:4]:
            engine.submit(request)
        run(engine)
        kinds = (Condition, Conditions, Row, Live, Flight)
        left = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)
    finally:
        gc.enable()
    assert all(left[name] <= before[name] for name in left), (left, before)


def test_pixels_that_cannot_be_kept_are_let_go_of(tiny: TextToImage) -> None:
    """Three of 72 are kept: when a second chunk is decoded, of the first one three are there."""
    held: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        held.append(sum(painted.pixels is not None for flight in flights() for painted in flight.painted.values()))
        return tiny.model.decode(latents)

    def flights() -> list[Flight[Any]]:
        return list(engine._flights.values())

    engine = altered(tiny, decode=decode).engine()
    asked = Request(prompt="a star", seed=4, num_images_per_prompt=72, keep=3, output_type="pt", prior=False)
    future = engine.submit(replace(asked, num_inference_steps=1))
    run(engine)
    assert held == [0, 0, 3]  # the first is measured
    result, whole = future.result(timeout=0), tiny.paint([replace(asked, num_inference_steps=1, keep=72)])[0]
    assert result.seeds == whole.seeds[:3] and (result.images - whole.images[:3]).abs().max() <= LEVEL


# --- what a request has taken ------------------------------------------------------------------------------------


def test_the_account_is_exact(tiny: TextToImage) -> None:
    """Against the evaluations that the networks were asked for, of requests that share calls."""
    asked = {"decoder": 0, "prior": 0}
    prior = copy.deepcopy(tiny.model.prior)
    assert prior is not None

    def call(x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        asked["decoder"] += len(x)
        return tiny.model.call(x, timestep, told)

    def count(module: Any, given: Any, out: Tensor) -> None:
        asked["prior"] += len(out)

    painter = altered(tiny, call=call, prior=prior)
    painter.paint([replace(request, num_images_per_prompt=3) for request in (PLAIN, KINDS[7])])  # measured by these
    prior.network.proj_in.register_forward_hook(count)
    asked["decoder"] = 0
    results = painter.paint(KINDS)
    for stage, number in asked.items():
        assert sum(result.account.evaluations[stage] for result in results) == number > 0
    assert results[4].account.evaluations["decoder"] == 2 * 3 * 2 * 2  # pictures, steps, of Heun's, guided
