"""What a picture is painted with: `Settings`, and what a model can be asked for: `Abilities`.

With the model, the prompt and the seed, settings are all that a picture depends on; a record holds them. Here they are
checked against what a model can do, which every request and every record is. It knows no network and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

from clip_core.fit import MOST_PIXELS
from gen.checks import as_number, one_of, real, texts, whole
from gen.prompts import plain
from samplers.guidance import RULES, Guide
from samplers.sample import SAMPLERS

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

MOST_THOUGHTS = 64  # of a prior for one candidate
SAMPLER_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")  # of samplers, each taken by some of them

SECOND = ("prompt_2", "negative_prompt_2")
# Pairs of pixels that a UNet is told beside the prompt and beside the null, and the least of each.
SIZES = {"original_size": 1, "target_size": 1, "crops_coords_top_left": 0}
SIZES |= {f"negative_{name}": least for name, least in SIZES.items()}
SCORES = ("aesthetic_score", "negative_aesthetic_score")
PAIRS = ("guidance_interval", *SIZES)


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a model can be asked for; a family fills it in from its networks' configurations."""

    size_multiple: int  # height and width are multiples of it
    cell_size: int  # pixels per latent cell, along each side
    latent_channels: int
    text_shape: tuple[int, int] | None = None  # (L, D) of prompt_embeds; None: this model takes none
    text_layers: int = 0  # clip_skip is smaller than this; 0: the decoder reads no text
    has_second_text: bool = False  # whether a second text tower may read another text
    tells_sizes: bool = False  # whether the UNet is told of a picture's size and crop
    tells_score: bool = False  # and of an aesthetic score, in place of the size asked for
    pooled_width: int | None = None  # P of pooled_prompt_embeds; None: this model takes none
    embedding_width: int | None  # E of image_embeds; None: this model takes none
    ip_adapter_shape: tuple[int, ...] | None = None  # (E,) or (S, E) of an ip_adapter_image_embeds; None: no IP-Adapter
    ip_adapter_sees: bool = False  # and it has an image encoder
    num_noise_levels: int  # noise_level is smaller than this; 0: no image embedding to noise
    max_steps: int  # the timesteps the decoder was trained on
    prior_max_steps: int  # 0: the model has no prior
    super_res_max_steps: int = 0  # 0: it has no super resolution
    needs_image: bool = False  # whether it paints nothing without an image embedding
    can_see: bool = False  # it makes embeddings of pictures, by CLIP's image tower
    can_compare: bool = False  # and of texts, by the same CLIP
    takes_null_image: bool = False  # whether it is guided away from an image embedding: negative_image_embeds
    has_null_image: bool = False  # whether it has one of its own
    reads_text: bool = True  # whether the decoder is told the prompt, and the negative one
    prior_reads_negative: bool = False  # whether the prior is told the negative prompt
    can_rank: bool  # a whole CLIP lies beside the model
    strength: float | None = None  # from a picture, if not told otherwise; None: it cannot begin with a picture
    mask_strength: float = 1.0  # the same where a part of the picture is painted anew
    needs_picture: bool = False  # whether it paints nothing but from a picture
    inpaints_alone: bool = False  # its UNet takes a mask beside x and does nothing without
    can_autoguide: bool = False  # a weaker network was loaded beside the decoder's
    can_tile: bool = False  # its autoencoder can go tile by tile
    defaults: Settings  # the model's own, from its scheduler and unclip.json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """With the model, the prompt and the seed, all that a picture depends on; JSON both ways."""

    height: int = 0  # pixels; 0 only before a model has filled it in
    width: int = 0
    num_inference_steps: int = 20
    strength: float = 1.0  # the share of these steps that is taken, where a picture was handed in
    denoising_start: float = 0.0  # the share of the training timesteps that another run has left behind; 0: none
    denoising_end: float = 1.0  # that at which this run ends, for another to go on; 1: it ends with a picture
    guidance_scale: float = 5.0  # 1: off
    guidance_interval: tuple[float, float] | None = None  # guided where low < sigma <= high; None: all
    guidance_rescale: float = 0.0  # 0: off, 1: the guided output keeps the prompt's own contrast
    guidance_rule: str = "cfg"  # one of `samplers.guidance.RULES`
    zero_init_steps: int = 0  # cfg_zero: first steps of output 0, for flows and v; the paper's 1
    apg_eta: float = 0.0  # apg: how much stays of guidance along the prompt's own estimate; 1: all
    apg_norm_threshold: float = 15.0  # apg: the largest norm of guidance; 0: any
    apg_momentum: float = -0.5  # apg: what the guidance of earlier steps counts
    clip_guidance_scale: float = 0.0  # of the gradient of CLIP's cosine (Nichol et al. 2022), some 10; 0: off
    thresholding: float = 0.0  # dynamic thresholding: what clean values keep within, 1 for pixels; 0: off
    dynamic_thresholding_ratio: float = 0.995  # the share of values that are not clipped
    negative_prompt: str = ""  # what the null condition says
    prompt_weights: bool = False  # whether (word:1.3), (word) and [word] say what words count; see `gen.prompts`
    long_prompts: bool = False  # whether a text too long for the tower is read in pieces, or cut
    prompt_2: str | None = None  # what the second text tower reads; None: the prompt
    negative_prompt_2: str | None = None  # what that reads for the null; None: negative_prompt
    original_size: tuple[int, int] | None = None  # (height, width) in pixels that the UNet is told; None: the picture's
    target_size: tuple[int, int] | None = None  # the same, of the size asked for
    crops_coords_top_left: tuple[int, int] | None = None  # (top, left) in pixels that it is told; None: 0, 0
    negative_original_size: tuple[int, int] | None = None  # each as it is told with the null; None: as with the prompt
    negative_target_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    aesthetic_score: float | None = None  # how pleasing a picture the UNet is told of; None only where it is told none
    negative_aesthetic_score: float | None = None  # the same with the null
    sampler: str = "ddim"
    eta: float | None = None  # fresh noise of a step, 0 none, 1 ancestral; None: the sampler's own
    s_churn: float | None = None  # noise added and taken away again, over all steps (Karras et al. 2022); None: none
    s_tmin: float | None = None  # churned where s_tmin <= sigma <= s_tmax; None: no limit
    s_tmax: float | None = None
    s_noise: float | None = None  # the deviation of what is added; None: 1
    clip_skip: int | None = None  # layers of the text tower left out; None: none, as trained
    noise_level: int = 0  # noise on the image embedding
    prior: bool = False  # whether a prior turns the text into an image embedding first
    prior_num_inference_steps: int = 25
    prior_guidance_scale: float = 1.0  # 1: off
    prior_best_of: int = 1  # of so many answers of the prior that nearest to the text; 2 in Ramesh et al. 2022
    interpolate_prompt: str = ""  # what it goes towards from the prompt; empty: nothing
    interpolation: float = 0.5  # how far, from 0 to 1, to another prompt or picture
    edit_from: str = ""  # what the picture that it is a variation of shows, where the prompt says what it should
    edit_amount: float = 0.3  # how far to turn it there, from 0 to 1; some 0.25 to 0.5
    super_res_num_inference_steps: int = 7  # of super resolution, where the model has it
    vae_tiling: bool = False  # whether the autoencoder goes tile by tile where a picture is larger than a tile

    @property
    def sampler_options(self) -> dict[str, float]:
        """The sampler's options that were chosen."""
        chosen = {name: getattr(self, name) for name in SAMPLER_OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}

    def plain(self, text: str) -> str:
        """A text as CLIP and a prior read it: without weights."""
        return plain(text) if self.prompt_weights else text

    @property
    def num_thoughts(self) -> int:
        """Answers that a prior is asked for."""
        return self.prior_best_of * (2 if self.interpolate_prompt else 1)

    @property
    def skipped_steps(self) -> int:
        """Steps left out at the beginning; as in diffusers, a share of a step is left out too."""
        return self.num_inference_steps - min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    @property
    def guide(self) -> Guide:
        """By which rule it is guided."""
        return Guide(
            rule=self.guidance_rule,
            zero_init_steps=self.zero_init_steps,
            apg_eta=self.apg_eta,
            apg_norm_threshold=self.apg_norm_threshold or math.inf,
            apg_momentum=self.apg_momentum,
        )

    @property
    def dynamic_thresholding(self) -> tuple[float, float] | None:
        """Percentile and bound, as `samplers.wrap.thresholded` takes them; None: off."""
        return (self.dynamic_thresholding_ratio, self.thresholding) if self.thresholding else None

    def to_json(self) -> dict[str, JSON]:
        """The settings as one flat JSON object."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in PAIRS if values[name] is not None}

    def updated(self, values: Mapping[str, Any], origin: str) -> Settings:
        """These settings with `values` in place; an unknown name is a ValueError that names its `origin`.

        Numbers become Python's own, for a record is JSON; pairs become tuples.
        """
        known = [item.name for item in fields(self)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{origin}: setting '{unknown[0]}' is unknown; choose from: {', '.join(known)}")
        pairs = {name: values[name] for name in PAIRS if isinstance(values.get(name), list | tuple)}  # a list in JSON
        told = {name: as_number(value) for name, value in values.items()}
        return replace(self, **told | {name: tuple(map(as_number, pair)) for name, pair in pairs.items()})


def check_settings(settings: Settings, able: Abilities) -> None:
    """Refuse settings this model cannot paint with (ValueError)."""
    for name in ("height", "width"):
        pixels = whole(name, getattr(settings, name), 1, MOST_PIXELS)
        if pixels % able.size_multiple:
            below = max(pixels // able.size_multiple, 1) * able.size_multiple
            raise ValueError(
                f"{name}={pixels} cannot be halved into latents; give a multiple of {able.size_multiple}, "
                f"such as {below}"
            )
    texts("negative_prompt", settings.negative_prompt)
    for name in ("prompt_weights", "long_prompts"):
        if not isinstance(value := getattr(settings, name), bool):
            raise ValueError(f"{name}={value!r}; give True or False")
        if value and not able.text_layers:
            raise ValueError(f"{name}=True, but this model reads a prompt only as it stands; leave {name} out")
    if settings.long_prompts and settings.interpolate_prompt:
        raise ValueError("long_prompts=True and interpolate_prompt were both given; leave one of them out")
    for name in SECOND:
        if (second := getattr(settings, name)) is not None:
            if not able.has_second_text:
                raise ValueError(f"{name} was given, but this model has no second text tower; leave it out")
            if settings.prompt_weights or settings.long_prompts:
                told = "prompt_weights" if settings.prompt_weights else "long_prompts"
                raise ValueError(f"{name} and {told}=True were both given; leave one of them out")
            texts(name, second)
    for name, at_least in SIZES.items():
        if (pair := getattr(settings, name)) is not None:
            if not able.tells_sizes:
                raise ValueError(f"{name} was given, but this model is told no sizes; leave it out")
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{name}={pair} is not a pair of pixels, down and across; give two whole numbers")
            for side in pair:
                whole(name, side, at_least)
    for name in SCORES:
        if (score := getattr(settings, name)) is not None:
            if not able.tells_score:
                raise ValueError(f"{name} was given, but this model is told no score, as a refiner is; leave it out")
            real(name, score, 0.0)
    whole("num_inference_steps", settings.num_inference_steps, 1, able.max_steps)
    if real("strength", settings.strength, 0.0, 1.0, hint="the share painted anew") == 0 or (
        settings.skipped_steps == settings.num_inference_steps
    ):
        least = math.ceil(100 / settings.num_inference_steps) / 100
        told = f"strength={settings.strength} leaves none of {settings.num_inference_steps} steps"
        raise ValueError(f"{told}; give {least} or more, up to 1, or more num_inference_steps")
    start, end = (real(name, getattr(settings, name), 0.0, 1.0) for name in ("denoising_start", "denoising_end"))
    if start >= end:
        told = f"denoising_start={start} is not below denoising_end={end}"
        raise ValueError(f"{told}; give shares of the way from noise to a picture, the start before the end")
    if end < 1 and able.super_res_max_steps:
        raise ValueError(f"denoising_end={end} leaves no whole picture, which super resolution needs; leave it out")
    real("guidance_scale", settings.guidance_scale, 1.0, hint="1 turns guidance off")
    real("guidance_rescale", settings.guidance_rescale, 0.0, 1.0)
    one_of("guidance_rule", settings.guidance_rule, list(RULES))
    if settings.guidance_rule == "autoguidance" and not able.can_autoguide:
        raise ValueError("guidance_rule=autoguidance needs a weaker UNet; load the model with weak_unet=FOLDER")
    whole("zero_init_steps", settings.zero_init_steps, 0, settings.num_inference_steps)
    real("apg_eta", settings.apg_eta, 0.0, 1.0)
    real("apg_norm_threshold", settings.apg_norm_threshold, 0.0)
    real("apg_momentum", settings.apg_momentum, -1.0, 1.0)
    if real("clip_guidance_scale", settings.clip_guidance_scale, 0.0) and not able.can_rank:
        raise ValueError("clip_guidance_scale was given, but this model has no clip/ to guide by; leave it out")
    real("thresholding", settings.thresholding, 0.0)
    if real("dynamic_thresholding_ratio", settings.dynamic_thresholding_ratio, 0.0, 1.0) == 0:
        raise ValueError(
            "dynamic_thresholding_ratio=0 is out of range; give a share above 0, or thresholding=0 for off"
        )
    one_of("sampler", settings.sampler, sorted(SAMPLERS))
    check_sampler_options(settings)
    if settings.guidance_interval is not None:
        interval = settings.guidance_interval
        if not isinstance(interval, tuple) or len(interval) != 2:
            raise ValueError(f"guidance_interval={interval} is not a pair (lowest, highest) of noise levels")
        low, high = (real("guidance_interval", end, 0.0) for end in interval)
        if low > high:
            raise ValueError(f"guidance_interval={interval} is upside down; give (lowest, highest) noise level")
    if settings.clip_skip is not None:
        if able.text_layers == 0:
            raise ValueError("clip_skip was given, but this model's decoder has no text tower of CLIP; leave it out")
        whole("clip_skip", settings.clip_skip, 0, able.text_layers - 1)
    if not isinstance(settings.prior, bool):
        raise ValueError(f"prior={settings.prior!r}; give True, False or None")
    if settings.prior:
        if able.prior_max_steps == 0:
            raise ValueError("prior=True, but this model has no prior; leave prior out, or give image_embeds")
        whole("prior_num_inference_steps", settings.prior_num_inference_steps, 1, able.prior_max_steps)
        real("prior_guidance_scale", settings.prior_guidance_scale, 1.0, hint="1 turns guidance off")
        whole("prior_best_of", settings.prior_best_of, 1, MOST_THOUGHTS)
    for name in ("interpolate_prompt", "edit_from"):
        if not isinstance(text := getattr(settings, name), str):
            raise ValueError(f"{name} is {text!r}; give a text")
    real("interpolation", settings.interpolation, 0.0, 1.0)
    real("edit_amount", settings.edit_amount, 0.0, 1.0)
    whole("noise_level", settings.noise_level, 0, max(able.num_noise_levels - 1, 0))
    if able.super_res_max_steps:
        whole("super_res_num_inference_steps", settings.super_res_num_inference_steps, 1, able.super_res_max_steps)
    if not isinstance(settings.vae_tiling, bool):
        raise ValueError(f"vae_tiling={settings.vae_tiling!r}; give True or False")
    if settings.vae_tiling and not able.can_tile:
        raise ValueError("vae_tiling=True, but this model's pictures are not decoded in tiles; leave vae_tiling out")


def check_sampler_options(settings: Settings) -> None:
    """Refuse options that this sampler does not take or that do not go together (ValueError)."""
    options = settings.sampler_options
    for name, value in options.items():
        real(name, value, 0.0, 1.0 if name == "eta" else math.inf)
        if name not in SAMPLERS[settings.sampler].defaults:
            takes = ", ".join(known for known, sampler in sorted(SAMPLERS.items()) if name in sampler.defaults)
            raise ValueError(f"{name}={value}, but sampler '{settings.sampler}' takes none; choose from: {takes}")
    low, high = options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)
    if low > high:
        raise ValueError(f"s_tmin={low} is above s_tmax={high}; give the lowest level churned and the highest")
    if options.get("eta", 0.0) > 0 and options.get("s_churn", 0.0) > 0:  # a step's noise is spent once
        told = f"eta={options['eta']} and s_churn={options['s_churn']}"
        raise ValueError(f"{told} were both given, and each would spend the noise of a step; set one of them to 0")
