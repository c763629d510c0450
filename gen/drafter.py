"""A UNet of its own for drafts: it says in few steps, unguided, what the decoder says in many steps, guided.

`unclip train draft` makes one of a model's UNet. What it paints is looked at and never handed over: candidates that go
on are painted by the decoder itself, so it decides which these are and never a pixel of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import UNet2DConditionModel

from gen.checkpoint import load_part, read_json, save_part, write_json
from gen.request import Candidate
from samplers.guidance import Guide

FOLDER = "draft_unet"  # in a model's folder; stock diffusers does not look there
TOLD = "draft.json"  # in that folder: what it was trained for
SAMPLER = "ddim"  # whose steps it was trained to take


@dataclass(frozen=True, eq=False)
class Drafter:
    """A UNet and what it was trained for."""

    unet: UNet2DConditionModel
    num_inference_steps: int
    guidance_scale: float  # of the decoder that it follows

    @classmethod
    def read(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """From a folder as `save` writes it; ValueError where one of its files is missing or damaged."""
        told = read_json(folder / TOLD)
        steps, scale = told.get("num_inference_steps"), told.get("guidance_scale")
        if not isinstance(steps, int) or steps < 1 or not isinstance(scale, int | float) or not scale >= 1:
            raise ValueError(
                f"model file '{folder / TOLD}' is damaged (num_inference_steps {steps!r}, guidance_scale {scale!r}); "
                "give 1 or more of each"
            )
        unet = load_part(UNet2DConditionModel, folder, device, dtype)
        assert isinstance(unet, UNet2DConditionModel), "it was asked for"
        return cls(unet, steps, float(scale))

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers UNet folder, and beside it what it was trained for; `dtype` None: as the weights are."""
        save_part(self.unet, folder, dtype)
        told = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        write_json(folder / TOLD, told)

    def follows(self, candidate: Candidate) -> bool:
        """Whether it was trained for a candidate: from a text and noise alone, guided as the decoder was."""
        settings = candidate.settings
        handed = (
            *(candidate.image, candidate.image_latents, candidate.mask_image, candidate.negative_prompt_embeds),
            *(candidate.ip_adapter_image, candidate.ip_adapter_image_embeds),
            *(candidate.image_embeds, candidate.variation_of),
        )
        plain = settings.guide == Guide() and settings.guidance_interval is None and not settings.negative_prompt
        changed = (settings.guidance_rescale, settings.thresholding, settings.clip_guidance_scale)
        return (
            settings.guidance_scale == self.guidance_scale
            and settings.num_inference_steps > self.num_inference_steps
            and settings.denoising_end == 1
            and not settings.prior
            and plain
            and not any(changed)
            and all(each is None for each in handed)
        )
