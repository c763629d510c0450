"""Requests join others at any tick and from any thread, and are answered as soon as they are done."""

from __future__ import annotations

import threading
from dataclasses import replace

from gen import TextToImage
from tests.engines import run
from tests.gen.engine.asked import KINDS, PLAIN, SECONDS, Latents, engine_of, same


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
