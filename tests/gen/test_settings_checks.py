"""What a model cannot paint with is refused by name, in one line, in the order in which settings are checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gen.settings import Abilities, Settings
from gen.settings_checks import MOST_PRIOR_SAMPLES, check_settings

GOOD = Settings(height=64, width=64, num_inference_steps=4)
ABLE = Abilities(
    size_multiple=8,
    cell_size=4,
    latent_channels=4,
    text_layers=3,
    has_second_text=True,
    tells_sizes=True,
    tells_score=True,
    embedding_width=32,
    num_noise_levels=10,
    max_steps=100,
    prior_max_steps=50,
    super_res_max_steps=20,
    can_rank=True,
    can_autoguide=True,
    can_tile=True,
    defaults=GOOD,
)


def test_what_a_model_can_do_is_not_refused() -> None:
    check_settings(GOOD, ABLE)
    most: dict[str, Any] = {"prompt_2": "a star", "original_size": (1, 9), "crops_coords_top_left": (0, 0)}
    most |= {"aesthetic_score": 6.5, "strength": 0.25, "denoising_start": 0.5, "guidance_rule": "autoguidance"}
    most |= {"clip_guidance_scale": 1.0, "guidance_interval": (0.5, 0.5), "clip_skip": 2, "vae_tiling": True}
    most |= {"prior": True, "prior_best_of": MOST_PRIOR_SAMPLES, "noise_level": 9, "super_res_num_inference_steps": 20}
    check_settings(replace(GOOD, **most), ABLE)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 68}, r"^height=68 cannot be halved into latents; give a multiple of 8, such as 64$"),
        ({"width": 3}, r"^width=3 cannot be halved into latents; give a multiple of 8, such as 8$"),
        ({"negative_prompt": 3}, "^negative_prompt is 3; give a text"),
        ({"prompt_weights": 1}, "^prompt_weights=1; give True or False$"),
        ({"long_prompts": True, "interpolate_prompt": "a star"}, "^long_prompts=True and interpolate_prompt were both"),
        ({"prompt_2": "a star", "long_prompts": True}, "^prompt_2 and long_prompts=True were both given; leave one"),
        ({"negative_prompt_2": 3}, "^negative_prompt_2 is 3; give a text"),
        ({"target_size": (8, 8, 8)}, r"^target_size=\(8, 8, 8\) is not a pair of pixels, down and across"),
        ({"target_size": (0, 8)}, "^target_size=0 is out of range; give a whole number of 1 or more"),
        ({"aesthetic_score": -1}, "^aesthetic_score=-1 is out of range; give a number of 0 or more"),
        ({"num_inference_steps": 101}, "^num_inference_steps=101 is out of range; give a whole number from 1 to 100"),
        ({"strength": 0.2}, "^strength=0.2 leaves none of 4 steps; give 0.25 or more, up to 1"),
        ({"denoising_start": 0.5, "denoising_end": 0.5}, "^denoising_start=0.5 is not below denoising_end=0.5"),
        ({"denoising_end": 0.5}, "^denoising_end=0.5 leaves no whole picture, which super resolution needs"),
        ({"guidance_scale": 0}, r"^guidance_scale=0 is out of range; give a number of 1 or more \(1 turns"),
        ({"guidance_rule": "apq"}, "^guidance_rule 'apq' is unknown; choose from: cfg"),
        ({"thresholding": -1}, "^thresholding=-1 is out of range"),
        ({"dynamic_thresholding_ratio": 0}, "^dynamic_thresholding_ratio=0 is out of range; give a share above 0"),
        ({"sampler": "eular"}, "^sampler 'eular' is unknown; choose from: ddim"),
        ({"s_churn": 1.0}, "^s_churn=1.0, but sampler 'ddim' takes none; choose from: euler, heun"),
        ({"guidance_interval": (2.0, 1.0)}, r"^guidance_interval=\(2.0, 1.0\) is upside down"),
        ({"clip_skip": 3}, "^clip_skip=3 is out of range; give a whole number from 0 to 2$"),
        ({"prior": 1}, "^prior=1; give True, False or None$"),
        ({"prior": True, "prior_best_of": MOST_PRIOR_SAMPLES + 1}, "^prior_best_of=65 is out of range"),
        ({"interpolate_prompt": 3}, "^interpolate_prompt is 3; give a text$"),
        ({"edit_amount": 2}, "^edit_amount=2 is out of range"),
        ({"noise_level": 10}, "^noise_level=10 is out of range; give a whole number from 0 to 9$"),
        ({"super_res_num_inference_steps": 0}, "^super_res_num_inference_steps=0 is out of range"),
        ({"vae_tiling": "yes"}, "^vae_tiling='yes'; give True or False$"),
        ({"vae_tiling": "yes", "noise_level": 10, "height": 0}, "^height=0"),  # the first of several
    ],
)
def test_settings_that_no_model_or_not_this_one_takes(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_settings(replace(GOOD, **asked), ABLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lacking", "asked", "message"),
    [
        ({"text_layers": 0}, {"prompt_weights": True}, "this model reads a prompt only as it stands"),
        ({"text_layers": 0}, {"clip_skip": 0}, "this model's decoder has no text tower of CLIP"),
        ({"has_second_text": False}, {"prompt_2": "a star"}, "prompt_2 was given, but this model has no second"),
        ({"tells_sizes": False}, {"negative_target_size": (8, 8)}, "negative_target_size was .* is told no sizes"),
        ({"tells_score": False}, {"aesthetic_score": 6.0}, "aesthetic_score was given, .* is told no score"),
        ({"can_autoguide": False}, {"guidance_rule": "autoguidance"}, "needs a weaker UNet"),
        ({"can_rank": False}, {"clip_guidance_scale": 1.0}, "this model has no clip/ to guide by"),
        ({"prior_max_steps": 0}, {"prior": True}, "prior=True, but this model has no prior"),
        ({"num_noise_levels": 0}, {"noise_level": 1}, "noise_level=1 is out of range; give a whole number from 0 to 0"),
        ({"can_tile": False}, {"vae_tiling": True}, "this model's pictures are not decoded in tiles"),
    ],
)
def test_what_a_model_cannot_do_is_refused(lacking: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    abilities, settings = replace(ABLE, **lacking), replace(GOOD, **asked)
    check_settings(GOOD, abilities)
    check_settings(settings, ABLE)
    with pytest.raises(ValueError, match=message):
        check_settings(settings, abilities)


def test_what_is_not_asked_of_a_model_is_not_checked() -> None:
    check_settings(replace(GOOD, prior_best_of=0, prior_num_inference_steps=0), ABLE)  # there is no prior
    small = replace(ABLE, super_res_max_steps=0)
    check_settings(replace(GOOD, super_res_num_inference_steps=0, denoising_end=0.5), small)
