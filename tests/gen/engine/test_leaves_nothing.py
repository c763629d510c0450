"""What a request held is let go of: on the way what is not needed any more, and all once it is done."""

from __future__ import annotations

import gc
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from torch import Tensor

from gen import Request, Result, TextToImage
from gen.conditioning import Condition, Conditions
from gen.flight import Flight, Painted
from gen.request import Job
from gen.row import Live, Row
from tests.engines import altered, run
from tests.gen.engine.asked import KINDS, PLAIN
from tests.pictures import LEVEL


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
