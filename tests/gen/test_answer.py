"""What comes back: pictures as they were asked for, in their order, and what is said where they are none."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen import Request, TextToImage
from gen.answer import diverse
from tests.pictures import LEVEL

PROMPTS = ["a small red circle", "a large blue square"]


def test_ranked_flat_and_best_first(tiny: TextToImage) -> None:
    everything = tiny(PROMPTS, num_images_per_prompt=6, seed=3, output_type="pt")
    assert everything.images.shape == (12, 3, 64, 64) and everything.scores is not None
    kept = tiny(PROMPTS, num_images_per_prompt=6, keep=2, seed=3, output_type="pt")
    assert kept.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 and kept.scores is not None
    for first in (0, 6):
        scores = everything.scores[first : first + 6]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 6
    assert kept.seeds == everything.seeds[:2] + everything.seeds[6:8]
    assert kept.scores == pytest.approx(everything.scores[:2] + everything.scores[6:8], abs=1e-5)
    assert torch.allclose(kept.images, everything.images[[0, 1, 6, 7]], atol=LEVEL)
    # every score and every seed of all that were painted, kept or not
    assert [each.seed for each in kept.candidates] == [*range(3, 9)] * 2
    assert sum(each.kept for each in kept.candidates) == 4
    assert sorted(each.score for each in kept.candidates) == pytest.approx(sorted(everything.scores), abs=1e-5)


def test_scores_are_clips_own_of_the_picture_on_file(tiny: TextToImage) -> None:
    result = tiny(PROMPTS, seed=3)
    clip = tiny.model.clip
    assert clip is not None and result.scores is not None
    for image, prompt, score in zip(result.images, result.prompts, result.scores, strict=True):
        assert isinstance(image, Image.Image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert clip.score(pixels, prompt).item() == pytest.approx(score, abs=1e-5)


def test_an_answer_is_shown_in_a_line_or_two(tiny: TextToImage) -> None:
    shown = repr(tiny(PROMPTS[0], num_images_per_prompt=2, seed=3))
    assert shown.startswith("Result(scores=[") and "seeds=[" in shown and "account=Account(" in shown
    assert len(shown) < 400


def test_without_ranking_drawing_order(tiny: TextToImage) -> None:
    result = tiny(PROMPTS, num_images_per_prompt=3, seed=[10, 20], rerank=False)
    assert result.scores is None and result.seeds == [10, 11, 12, 20, 21, 22]
    assert all(record["score"] is None for record in result.records)


@pytest.mark.parametrize("output_type", ["pil", "pt", "np", "latent"])
@pytest.mark.parametrize("rerank", [True, False])
def test_numbers_that_are_not_finite_are_an_error_of_their_request(
    tiny: TextToImage, output_type: str, rerank: bool
) -> None:
    asked = {"num_inference_steps": 2, "seed": 3, "output_type": output_type, "rerank": rerank}
    with warnings.catch_warnings(), tiny.engine() as engine:
        warnings.simplefilter("error")
        bad = engine.submit(Request(prompt=PROMPTS[0], guidance_scale=1e38, **asked))
        good = engine.submit(Request(prompt=PROMPTS[1], num_images_per_prompt=2, **asked))
        message = r"the picture of seed 3 came out as numbers that are not finite; lower guidance_scale=1e\+38$"
        with pytest.raises(ValueError, match=message):
            bad.result()
        assert good.result().seeds in ([3, 4], [4, 3])


def test_one_candidate_that_is_not_finite_is_told_though_others_are_kept(tiny: TextToImage) -> None:
    latents = torch.randn(2, 4, 8, 8)
    latents[1, 0, 0, 0] = 1e38
    asked = {"num_images_per_prompt": 2, "latents": latents, "num_inference_steps": 2, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match=r"picture of seed 8 .*; the weights of its model may be damaged"):
        tiny(PROMPTS[0], keep=1, seed=7, prior=False, **asked)


def test_output_types_show_one_picture(tiny: TextToImage) -> None:
    asked: dict[str, Any] = {"seed": 4, "num_images_per_prompt": 2, "height": 32, "width": 48}
    pil, pt, np_, latent = (tiny("a star", output_type=kind, **asked).images for kind in ("pil", "pt", "np", "latent"))
    assert pt.shape == (2, 3, 32, 48) and np_.shape == (2, 32, 48, 3) and latent.shape == (2, 4, 4, 6)
    assert pt.min() >= 0 and pt.max() <= 1
    assert np.array_equal(np_, pt.permute(0, 2, 3, 1).numpy())
    assert [picture.size for picture in pil] == [(48, 32)] * 2
    assert np.array_equal(np.stack([np.asarray(p) for p in pil]), (np_ * 255).round().astype(np.uint8))
    with torch.no_grad():
        assert torch.allclose(tiny.model.decode(latent), pt, atol=1e-6)


def test_of_a_prompt_without_a_picture_none_is_kept() -> None:
    assert diverse({}, [0, 1], 2) == []
