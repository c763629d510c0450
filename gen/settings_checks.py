"""Whether a model can paint with settings: they are checked before anything runs, a request's and a record's alike.

What is refused is a ValueError of one line. It knows no network and no file.
"""

from __future__ import annotations

import math

from clip_core.fit import MOST_PIXELS
from gen.checks import boolean, finite_float, integer, one_of, texts
from gen.settings import SCORES, SECOND, SIZES, Abilities, Settings
from samplers.guidance import RULES
from samplers.sample import SAMPLERS

MOST_PRIOR_SAMPLES = 64  # of a prior for one candidate


def check_settings(settings: Settings, abilities: Abilities) -> None:
    """Refuse settings this model cannot paint with (ValueError); each function below refuses some."""
    check_size(settings, abilities)
    check_words(settings, abilities)
    check_sizes_and_scores(settings, abilities)
    check_steps(settings, abilities)
    check_guidance(settings, abilities)
    check_thresholding(settings)
    check_sampler(settings)
    check_interval(settings)
    check_clip_skip(settings, abilities)
    check_prior(settings, abilities)
    check_embedding(settings, abilities)
    check_decoding(settings, abilities)


def check_size(settings: Settings, abilities: Abilities) -> None:
    """Height and width that divide into latents."""
    for name in ("height", "width"):
        pixels = integer(name, getattr(settings, name), 1, MOST_PIXELS)
        if pixels % abilities.size_multiple:
            below = max(pixels // abilities.size_multiple, 1) * abilities.size_multiple
            raise ValueError(
                f"{name}={pixels} cannot be halved into latents; give a multiple of {abilities.size_multiple}, "
                f"such as {below}"
            )


def check_words(settings: Settings, abilities: Abilities) -> None:
    """The null's text, how texts are read, and what a second text tower reads."""
    texts("negative_prompt", settings.negative_prompt)
    for name in ("prompt_weights", "long_prompts"):
        if boolean(name, getattr(settings, name)) and not abilities.text_layers:
            raise ValueError(f"{name}=True, but this model reads a prompt only as it stands; leave {name} out")
    if settings.long_prompts and settings.interpolate_prompt:
        raise ValueError("long_prompts=True and interpolate_prompt were both given; leave one of them out")
    for name in SECOND:
        if (second := getattr(settings, name)) is not None:
            if not abilities.has_second_text:
                raise ValueError(f"{name} was given, but this model has no second text tower; leave it out")
            if settings.prompt_weights or settings.long_prompts:
                other = "prompt_weights" if settings.prompt_weights else "long_prompts"
                raise ValueError(f"{name} and {other}=True were both given; leave one of them out")
            texts(name, second)


def check_sizes_and_scores(settings: Settings, abilities: Abilities) -> None:
    """Sizes and scores that the UNet is told beside the texts."""
    for name, at_least in SIZES.items():
        if (pair := getattr(settings, name)) is not None:
            if not abilities.tells_sizes:
                raise ValueError(f"{name} was given, but this model is told no sizes; leave it out")
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{name}={pair} is not a pair of pixels, down and across; give two whole numbers")
            for side in pair:
                integer(name, side, at_least)
    for name in SCORES:
        if (score := getattr(settings, name)) is not None:
            if not abilities.tells_score:
                raise ValueError(f"{name} was given, but this model is told no score, as a refiner is; leave it out")
            finite_float(name, score, 0.0)


def check_steps(settings: Settings, abilities: Abilities) -> None:
    """How many steps, and which share of the way from noise to a picture."""
    integer("num_inference_steps", settings.num_inference_steps, 1, abilities.max_steps)
    if finite_float("strength", settings.strength, 0.0, 1.0, hint="the share painted anew") == 0 or (
        settings.skipped_steps == settings.num_inference_steps
    ):
        least = math.ceil(100 / settings.num_inference_steps) / 100
        problem = f"strength={settings.strength} leaves none of {settings.num_inference_steps} steps"
        raise ValueError(f"{problem}; give {least} or more, up to 1, or more num_inference_steps")
    start, end = (
        finite_float(name, getattr(settings, name), 0.0, 1.0) for name in ("denoising_start", "denoising_end")
    )
    if start >= end:
        problem = f"denoising_start={start} is not below denoising_end={end}"
        raise ValueError(f"{problem}; give shares of the way from noise to a picture, the start before the end")
    if end < 1 and abilities.super_res_max_steps:
        raise ValueError(f"denoising_end={end} leaves no whole picture, which super resolution needs; leave it out")


def check_guidance(settings: Settings, abilities: Abilities) -> None:
    """How much it is guided, and by which rule."""
    finite_float("guidance_scale", settings.guidance_scale, 1.0, hint="1 turns guidance off")
    finite_float("guidance_rescale", settings.guidance_rescale, 0.0, 1.0)
    one_of("guidance_rule", settings.guidance_rule, list(RULES))
    if settings.guidance_rule == "autoguidance" and not abilities.can_autoguide:
        raise ValueError("guidance_rule=autoguidance needs a weaker UNet; load the model with weak_unet=FOLDER")
    integer("zero_init_steps", settings.zero_init_steps, 0, settings.num_inference_steps)
    finite_float("apg_eta", settings.apg_eta, 0.0, 1.0)
    finite_float("apg_norm_threshold", settings.apg_norm_threshold, 0.0)
    finite_float("apg_momentum", settings.apg_momentum, -1.0, 1.0)
    if finite_float("clip_guidance_scale", settings.clip_guidance_scale, 0.0) and not abilities.can_rank:
        raise ValueError("clip_guidance_scale was given, but this model has no clip/ to guide by; leave it out")


def check_thresholding(settings: Settings) -> None:
    """What clean values keep within."""
    finite_float("thresholding", settings.thresholding, 0.0)
    if finite_float("dynamic_thresholding_ratio", settings.dynamic_thresholding_ratio, 0.0, 1.0) == 0:
        raise ValueError(
            "dynamic_thresholding_ratio=0 is out of range; give a share above 0, or thresholding=0 for off"
        )


def check_sampler(settings: Settings) -> None:
    """A sampler, and options that it takes and that go together."""
    one_of("sampler", settings.sampler, sorted(SAMPLERS))
    options = settings.sampler_options
    for name, value in options.items():
        finite_float(name, value, 0.0, 1.0 if name == "eta" else math.inf)
        if name not in SAMPLERS[settings.sampler].defaults:
            takes = ", ".join(known for known, sampler in sorted(SAMPLERS.items()) if name in sampler.defaults)
            raise ValueError(f"{name}={value}, but sampler '{settings.sampler}' takes none; choose from: {takes}")
    low, high = options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)
    if low > high:
        raise ValueError(f"s_tmin={low} is above s_tmax={high}; give the lowest level churned and the highest")
    if options.get("eta", 0.0) > 0 and options.get("s_churn", 0.0) > 0:  # a step's noise is spent once
        given = f"eta={options['eta']} and s_churn={options['s_churn']}"
        raise ValueError(f"{given} were both given, and each would spend the noise of a step; set one of them to 0")


def check_interval(settings: Settings) -> None:
    """Between which noise levels it is guided."""
    if (interval := settings.guidance_interval) is None:
        return
    if not isinstance(interval, tuple) or len(interval) != 2:
        raise ValueError(f"guidance_interval={interval} is not a pair (lowest, highest) of noise levels")
    low, high = (finite_float("guidance_interval", end, 0.0) for end in interval)
    if low > high:
        raise ValueError(f"guidance_interval={interval} is upside down; give (lowest, highest) noise level")


def check_clip_skip(settings: Settings, abilities: Abilities) -> None:
    """How many layers of the text tower are left out."""
    if settings.clip_skip is not None:
        if abilities.text_layers == 0:
            raise ValueError("clip_skip was given, but this model's decoder has no text tower of CLIP; leave it out")
        integer("clip_skip", settings.clip_skip, 0, abilities.text_layers - 1)


def check_prior(settings: Settings, abilities: Abilities) -> None:
    """A prior, and what it is asked for."""
    if not isinstance(settings.prior, bool):
        raise ValueError(f"prior={settings.prior!r}; give True, False or None")
    if settings.prior:
        if abilities.prior_max_steps == 0:
            raise ValueError("prior=True, but this model has no prior; leave prior out, or give image_embeds")
        integer("prior_num_inference_steps", settings.prior_num_inference_steps, 1, abilities.prior_max_steps)
        finite_float("prior_guidance_scale", settings.prior_guidance_scale, 1.0, hint="1 turns guidance off")
        integer("prior_best_of", settings.prior_best_of, 1, MOST_PRIOR_SAMPLES)


def check_embedding(settings: Settings, abilities: Abilities) -> None:
    """What becomes of an image embedding before the decoder is told."""
    for name in ("interpolate_prompt", "edit_from"):
        if not isinstance(text := getattr(settings, name), str):
            raise ValueError(f"{name} is {text!r}; give a text")
    finite_float("interpolation", settings.interpolation, 0.0, 1.0)
    finite_float("edit_amount", settings.edit_amount, 0.0, 1.0)
    integer("noise_level", settings.noise_level, 0, max(abilities.num_noise_levels - 1, 0))


def check_decoding(settings: Settings, abilities: Abilities) -> None:
    """From the decoder's latents to pixels."""
    if abilities.super_res_max_steps:
        integer(
            "super_res_num_inference_steps", settings.super_res_num_inference_steps, 1, abilities.super_res_max_steps
        )
    if boolean("vae_tiling", settings.vae_tiling) and not abilities.can_tile:
        raise ValueError("vae_tiling=True, but this model's pictures are not decoded in tiles; leave vae_tiling out")
