"""What goes wrong ends the requests that it concerns, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gen import TextToImage
from gen.conditioning import Conditions
from tests.engines import altered, run
from tests.gen.engine.asked import KINDS, PLAIN, Latents, Refused, alone, engine_of, same
from tests.pictures import LEVEL


def test_a_text_that_cannot_be_encoded_fails_its_request_alone(tiny: TextToImage, expected: list[Latents]) -> None:
    def encode_prompts(candidates: Sequence[Any], table: Any) -> Any:
        if any("zebra" in candidate.prompt for candidate in candidates):
            raise Refused("no zebras")
        return tiny.model.encode_prompts(candidates, table)

    engine = engine_of(altered(tiny, encode_prompts=encode_prompts))
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

    def call(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if broken and x.shape[2:] == (8, 8):
            raise Refused("a bad call")
        return tiny.model.call(x, timestep, conditions)

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
