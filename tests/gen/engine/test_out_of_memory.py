"""Memory that runs out: calls get smaller, and where that is not enough other requests are painted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from gen import Request, TextToImage
from gen.conditioning import Conditions
from samplers.state import State
from tests.engines import altered, run
from tests.gen.engine.asked import KINDS, Latents, engine_of, same
from tests.pictures import LEVEL


def test_when_memory_runs_out_nobody_notices(tiny: TextToImage, expected: list[Latents]) -> None:
    refused: Counter[int] = Counter()

    def short(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if len(x) > 3:
            refused[len(x)] += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tiny.model.call(x, timestep, conditions)

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
