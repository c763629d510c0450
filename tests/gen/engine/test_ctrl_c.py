"""Ctrl-C ends a call, leaves what was painted, and the model paints on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gen import Engine, Interrupted, Result, Step, TextToImage
from tests.gen.engine.asked import KINDS, PLAIN, Latents, same
from tests.pictures import LEVEL


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
