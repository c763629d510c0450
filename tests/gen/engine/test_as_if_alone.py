"""A request is answered as if it were alone, whatever joins, leaves or goes wrong beside it."""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from gen import Request, Step, TextToImage
from gen.search import Field, Go, Moves
from samplers.sample import SAMPLERS
from tests.engines import buckets_of
from tests.gen.engine.asked import KINDS, PLAIN, SECONDS, Latents, Refused, alone, engine_of, same
from tests.pictures import LEVEL


def refuse(step: Step) -> None:
    if step.stage == "decoder" and step.steps_left[0] == 1:
        raise Refused("no more")


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
