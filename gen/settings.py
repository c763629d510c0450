"""What a picture is painted with: `Settings`, and what a model can be asked for: `Abilities`.

With the model, the prompt and the seed, settings are all that a picture depends on; a record holds them. Whether a
model can paint with them is `gen.settings_checks`' to say. It knows no network and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

from gen.checks import as_number
from gen.prompts import plain
from samplers.guidance import Guide

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

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
    def num_prior_samples(self) -> int:
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
        numbers = {name: as_number(value) for name, value in values.items()}
        return replace(self, **numbers | {name: tuple(map(as_number, pair)) for name, pair in pairs.items()})
