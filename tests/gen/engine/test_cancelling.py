"""Requests that are cancelled, by who waits for them or by their own callback."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, wait
from dataclasses import replace

import pytest

from gen import Cancelled, Step, TextToImage
from tests.engines import run
from tests.gen.engine.asked import KINDS, PLAIN, SECONDS, Latents, all_rows, engine_of, same


@pytest.mark.parametrize("ticks", [0, 1, 4])  # before it begins, in the prior, in the decoder
def test_a_cancelled_request_is_out_at_the_next_tick(tiny: TextToImage, expected: list[Latents], ticks: int) -> None:
    engine = engine_of(tiny)
    kept, gone = engine.submit(KINDS[1]), engine.submit(KINDS[5])
    run(engine, ticks)
    assert gone.cancel() and gone.cancelled()
    engine.tick()
    seeds = {one.row.seed for one in all_rows(engine)}
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
