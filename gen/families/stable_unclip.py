"""Stable unCLIP, which is also the layout of this project's own models.

The UNet reads the prompt's text tokens by cross-attention and a noised CLIP image embedding through its class
input; the embedding comes from a prior, from the caller, or is left out (zeros). Null is the empty (or
negative) prompt with zeros over the whole class input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers import DDPMScheduler, UnCLIPScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from clip_core.device import to_device, weights_dtype
from clip_core.text import TextTower
from gen.candidate import Candidate
from gen.checkpoint import Parts
from gen.conditioning import Condition, ConditionPair, Conditions, Table
from gen.families.autoencoder import KLModel
from gen.families.base import listed, with_images
from gen.families.reader import Reader
from gen.model_index import IMAGE_PARTS
from gen.prior import Prior
from gen.scheduler import NoiseLevels
from gen.settings import JSON, Abilities
from samplers.noise import noise

IMG2IMG = "StableUnCLIPImg2ImgPipeline"  # has no prior


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StableUnCLIP(KLModel, Reader):
    """A loaded Stable unCLIP model."""

    image_normalizer: StableUnCLIPImageNormalizer
    image_noising: SchedulerMixin
    prior: Prior | None = None
    needs_image: bool = False  # whether it was made for image embeddings that others hand over, and not for text alone

    SAVED_AS: ClassVar[str] = "StableUnCLIPPipeline"
    STOCK_DEFAULTS: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 20,
        "guidance_scale": 10.0,
        "prior_num_inference_steps": 25,
        "prior_guidance_scale": 4.0,
    }

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        needed = ["unet", "vae", "tokenizer", "text_encoder", "scheduler", "image_normalizer"]
        needed.append("image_noising_scheduler")
        if "prior" in parts.modules:
            needed += ["prior_tokenizer", "prior_text_encoder", "prior_scheduler"]
        got = listed(parts, needed)
        model = cls(
            unet=got["unet"],
            vae=got["vae"],
            text=TextTower(got["tokenizer"], got["text_encoder"]),
            levels=NoiseLevels.of(got["scheduler"], str(parts.folder / "scheduler")),
            image_normalizer=got["image_normalizer"],
            image_noising=got["image_noising_scheduler"],
            needs_image=parts.family == IMG2IMG and "prior" not in got,
            image_encoder=parts.modules.get("image_encoder"),
            feature_extractor=parts.modules.get("feature_extractor"),
            clip=parts.clip,
            card=parts.card,
        )
        if "prior" in got:
            prior = Prior(
                got["prior"],
                got["prior_tokenizer"],
                got["prior_text_encoder"],
                NoiseLevels.of(steps_of(got["prior_scheduler"]), str(parts.place("prior_scheduler"))),
            )
            model = replace(model, prior=prior)
        model.check(str(parts.folder))
        return model

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        width = self.embedding_width
        required = super().required_config()
        required["unet class input"] = (self.unet.config.projection_class_embeddings_input_dim, 2 * width)
        return required if self.prior is None else required | self.prior.required_config(width, "prior")

    @property
    def embedding_width(self) -> int:
        """E of the image embedding."""
        return self.image_normalizer.config.embedding_dim

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        num_noise_levels = self.image_noising.config.num_train_timesteps
        return replace(super().make_abilities(), num_noise_levels=num_noise_levels, needs_image=self.needs_image)

    @property
    def saved_as(self) -> str:
        """The pipeline class of model_index.json."""
        return IMG2IMG if self.needs_image else self.SAVED_AS

    @property
    def index(self) -> dict[str, JSON]:
        """What model_index.json says beside the parts."""
        return {name: [None, None] for name in IMAGE_PARTS} if self.needs_image and not self.image_parts else {}

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        parts = super().parts()
        parts |= {"image_normalizer": self.image_normalizer, "image_noising_scheduler": self.image_noising}
        parts |= self.image_parts
        if self.prior is not None:
            parts |= {
                "prior": self.prior.network,
                "prior_tokenizer": self.prior.tokenizer,
                "prior_text_encoder": self.prior.text_encoder,
                "prior_scheduler": self.prior.levels.stock,
            }
        return parts

    def encode_prompts(self, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
        """What each candidate is told before any prior has spoken: its words, and the image embedding it came with."""
        return with_images(self, candidates, super().encode_prompts(candidates, table), self.device)

    def add_image_embeds(
        self, candidates: Sequence[Candidate], conditions: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """What each candidate is told in words, with an image embedding (E,) beside it, noised as its settings say."""
        levels = to_device(torch.tensor([one.settings.noise_level for one in candidates]), self.device)
        seeds = [one.first_seed for one in candidates]
        fresh = to_device(noise(seeds, "image_noise", 0, (self.embedding_width,)), self.device)
        vectors = self.noise_image_embeddings(torch.stack(list(image_embeds)), levels, fresh).to(
            weights_dtype(self.unet)
        )
        return [replace(each, pooled_projections=vector) for each, vector in zip(conditions, vectors, strict=True)]

    def handed(self, tokens: Tensor, pooled: Tensor | None = None) -> Condition:
        """What the UNet is told of a text with these token states (L, D): no image embedding."""
        zeros = torch.zeros(2 * self.embedding_width, dtype=weights_dtype(self.unet), device=self.device)
        return replace(super().handed(tokens, pooled), pooled_projections=zeros)

    def unet_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """What the UNet is told beside the token states, by the names of its arguments."""
        return {"class_labels": conditions.pooled_projections}

    def noise_image_embeddings(self, image_embeds: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Noised embedding (B, E) beside the sinusoids of its level (B,): (B, 2E), the UNet's class input.

        As diffusers' `noise_image_embeddings`: the noise is added in normalised units. All on one device.
        """
        mean, std = self.image_normalizer.mean.float(), self.image_normalizer.std.float()
        noised = self.image_noising.add_noise((image_embeds - mean) / std, timesteps=level, noise=noise)
        level_embeds = get_timestep_embedding(
            level, image_embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([noised * std + mean, level_embeds.to(noised.dtype)], dim=1)


def steps_of(stock: SchedulerMixin) -> SchedulerMixin:
    """A prior's scheduler; DDPM in the place of Karlo's own, as diffusers' documentation puts the two together.

    UnCLIPScheduler wants to be told the timestep that comes next, which stock's pipeline of this family does not do.
    """
    return DDPMScheduler.from_config(stock.config) if isinstance(stock, UnCLIPScheduler) else stock
