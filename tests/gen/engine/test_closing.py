"""The end of an engine and of its thread: every future is done."""

from __future__ import annotations

from concurrent.futures import wait
from dataclasses import replace

import pytest

from gen import Step, TextToImage
from tests.gen.engine.asked import KINDS, PLAIN, SECONDS, Latents, Refused, engine_of, same


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


def test_an_engine_in_its_own_thread_is_not_ticked_from_another(tiny: TextToImage) -> None:
    with engine_of(tiny) as engine, pytest.raises(RuntimeError, match="in a thread of its own"):
        engine.tick()
    with pytest.raises(RuntimeError, match="started before"):
        engine.start()
