"""A UNet of its own for drafts: it says in few steps, unguided, what the decoder says in many steps, guided.

`unclip train draft` makes one of a model's UNet, and `gen.adapters.drafts` reads it. What it paints is looked at and
never handed over: candidates that go on are painted by the decoder itself, so it decides which these are and never a
pixel of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from gen.candidate import Candidate
from samplers.guidance import Guide

SAMPLER = "ddim"  # whose steps it was trained to take


@dataclass(frozen=True, eq=False)
class Drafter:
    """A UNet and what it was trained for."""

    unet: UNet2DConditionModel
    num_inference_steps: int
    guidance_scale: float  # of the decoder that it follows

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
