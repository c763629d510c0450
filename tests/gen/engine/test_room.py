"""How many rows are in flight at once: those that were allowed, or that a call has room for; the others wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gen import Engine, Request, TextToImage
from gen.bucket import FEW, Bucket, Buckets
from gen.flight import DECODER, PRIOR, row_key
from gen.resolve import resolve
from tests.engines import buckets_of, run
from tests.gen.engine.asked import KINDS, PLAIN, Latents, all_rows, alone, decoder_rows, engine_of, same


def test_no_more_rows_are_in_flight_than_were_allowed(tiny: TextToImage, expected: list[Latents]) -> None:
    engine = engine_of(tiny, max_rows=3)
    futures = [engine.submit(request) for request in KINDS]
    seen = []
    while engine.tick():
        seen.append(len(all_rows(engine)))
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
            seen.append(sum(row_key(one.row).request == 0 for one in all_rows(engine)))
            held.append(len(flight.conditions))
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
    engine = Engine(model.model, lambda job, painted, account: len(painted), buckets=buckets)
    seen, most_thinking = list[int](), 0
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
