"""Families whose UNet paints an autoencoder's latents: between those and pixels, and what a search may look through."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from gen.families.painter import Painter
from gen.preview import SMALL, Preview, fitted
from gen.settings import Settings


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LatentModel(Painter):
    """A loaded model of any of these families."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32."""

    def preview(self, latents: Tensor) -> Tensor:
        """The same as `decode`, cheaply and roughly; see `gen.preview`."""
        return self._look(latents)

    def is_small(self, settings: Settings) -> bool:
        """Whether a search may look at pictures of these settings through the autoencoder itself."""
        return settings.height * settings.width <= SMALL

    @cached_property
    def _look(self) -> Preview:
        defaults = self.abilities.defaults
        return fitted(self.encode, self.decode, defaults.height, defaults.width, self.factor, self.device)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class KLModel(LatentModel):
    """With a variational autoencoder (Rombach et al. 2022)."""

    vae: AutoencoderKL

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.vae.config.latent_channels

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | {"vae": self.vae}

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32."""
        posterior = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent_dist
        mean, deviation = self._latent_moments
        return (posterior.mode().float() - mean) / deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        mean, deviation = self._latent_moments
        z = (latents * deviation + mean).to(self.vae.dtype)
        pixels = self.vae.decode(z, return_dict=False)[0].float()
        return (pixels / 2 + 0.5).clamp(0, 1)

    @cached_property
    def _latent_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (1, C, 1, 1) of what the autoencoder itself says, by which latents are normed."""
        config, channels = self.vae.config, self.latent_channels
        mean, deviation = config.latents_mean or [0.0] * channels, config.latents_std or [1.0] * channels
        moments = torch.tensor([mean, deviation], device=self.device).reshape(2, 1, channels, 1, 1)
        return moments[0], moments[1] / config.scaling_factor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MoVQModel(LatentModel):
    """With a VQ autoencoder whose decoder is led by the latents throughout (Zheng et al. 2022), not quantised."""

    movq: VQModel

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.movq.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.movq.config.latent_channels

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | {"movq": self.movq}

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32; they are not scaled."""
        return self.movq.encode((pixels * 2 - 1).to(self.movq.dtype), return_dict=False)[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        pixels = self.movq.decode(latents.to(self.movq.dtype), force_not_quantize=True, return_dict=False)[0].float()
        return (pixels / 2 + 0.5).clamp(0, 1)
