"""Families whose UNet paints an autoencoder's latents: between those and pixels, and what a search may look through.

Also what such a model makes of a picture that is handed in, and of its mask.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from clip_core.device import to_device, weights_dtype
from gen.edit import Beside, EncodedImage, Posterior
from gen.families.base import FamilyModel
from gen.preview import SMALL, Preview, fitted
from gen.settings import Abilities, Settings
from gen.source import LANCZOS, Filter, cells


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LatentModel(FamilyModel):
    """A loaded model of any of these families."""

    INPAINTS_AS: ClassVar[str | None] = None  # the pipeline class of a UNet for inpainting; None: the family knows none
    STRENGTH: ClassVar[float]  # from a picture, as stock's class paints
    MASK_STRENGTH: ClassVar[float] = 1.0  # the same of its class for inpainting
    RESIZED_BY: ClassVar[Filter] = LANCZOS  # how stock's class brings pictures to the size that is painted

    @abstractmethod
    def posterior(self, pixels: Tensor) -> Posterior:
        """What the autoencoder says of pixels (3, H, W) in [0, 1]."""

    @abstractmethod
    def read_masked(self, pixels: Tensor, white: Tensor, image: Posterior, is_painted: Tensor) -> EncodedImage:
        """As `read_picture`, by a UNet for inpainting; `is_painted` is the mask as latents have it, (1, h, w) bool."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32."""

    @property
    def saved_as(self) -> str:
        """The pipeline class of model_index.json."""
        return self.INPAINTS_AS if self.INPAINTS_AS and self.adds_mask else super().saved_as

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        beside = self.latent_channels + 1 if self.adds_mask else 0
        return super().required_config() | {
            "unet in_channels": (self.unet.config.in_channels, self.latent_channels + beside)
        }

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        begun = replace(super().make_abilities(), strength=self.STRENGTH, mask_strength=self.MASK_STRENGTH)
        return replace(begun, inpaints_alone=self.adds_mask)

    @property
    def adds_mask(self) -> bool:
        """Whether the UNet takes a mask and the masked picture's latents beside x: one for inpainting."""
        return self.INPAINTS_AS is not None and self.unet.config.in_channels == 2 * self.latent_channels + 1

    @property
    def resized_by(self) -> Filter:
        """How pictures are brought to the size that is painted."""
        return self.RESIZED_BY

    def read_picture(self, pixels: Tensor, white: Tensor | None) -> EncodedImage:
        """What is made of pixels (3, H, W) in [0, 1], and of where they are painted anew: (1, H, W) bool."""
        image = self.posterior(pixels)
        if white is None:
            return EncodedImage(image)
        is_painted = cells(white, image.mean.shape[-2:]).to(image.mean.device)
        if self.adds_mask:
            return self.read_masked(pixels, white, image, is_painted)
        return EncodedImage(image, is_painted, is_held=True)

    @property
    @abstractmethod
    def pixel_channels(self) -> int:
        """Channels of the decoder's layers that are as large as the picture."""

    def held_at_once(self, settings: Settings, is_decoded: bool) -> int:
        """As of every family, or what the decoder's last layers read and answer, where that is more."""
        decoded = 2 * self.pixel_channels * self.pixels_at_once(settings) if is_decoded else 0
        return max(decoded, super().held_at_once(settings, is_decoded))

    def pixels_at_once(self, settings: Settings) -> int:
        """How many pixels of a picture the decoder makes at once."""
        return settings.height * settings.width

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

    STRENGTH: ClassVar[float] = 0.8

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.vae.config.latent_channels

    @property
    def pixel_channels(self) -> int:
        """Channels of the decoder's layers that are as large as the picture."""
        return self.vae.config.block_out_channels[0]

    def pixels_at_once(self, settings: Settings) -> int:
        """How many pixels of a picture the decoder makes at once: of a tile at most, where it goes by tiles."""
        if not (settings.vae_tiling or self.vae.use_tiling):
            return super().pixels_at_once(settings)
        tile = self.vae.tile_sample_min_size
        return min(settings.height, tile) * min(settings.width, tile)

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        return replace(super().make_abilities(), can_tile=has_tiles(self.vae, self.factor))

    @cached_property
    def tiled(self) -> Self:
        """The same, whose autoencoder goes tile by tile: by the same layers, and a switch of its own."""
        vae = copy.copy(self.vae)
        vae.enable_tiling()
        return replace(self, vae=vae)

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | {"vae": self.vae}

    def networks(self) -> list[nn.Module]:
        """What a runtime other than torch may compute (`gen.runtime`)."""
        return [*super().networks(), self.vae.decoder]

    def posterior(self, pixels: Tensor) -> Posterior:
        """What the autoencoder says of pixels (3, H, W) in [0, 1]."""
        distribution = self.vae.encode((pixels * 2 - 1)[None].to(self.device, weights_dtype(self.vae))).latent_dist
        mean, deviation = self._latent_moments
        return Posterior(((distribution.mean.float() - mean) / deviation)[0], (distribution.std.float() / deviation)[0])

    def read_masked(self, pixels: Tensor, white: Tensor, image: Posterior, is_painted: Tensor) -> EncodedImage:
        """The UNet is told the latents of the picture without what is painted anew."""
        masked = self.posterior(torch.where(white, 0.5, pixels))  # 0 of pixels in [-1, 1]
        return EncodedImage(image, is_painted, beside=Beside(masked, is_painted.float(), mask_first=True))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32: those in the posterior's middle."""
        return to_latents(self.vae, pixels, self._latent_moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        mean, deviation = self._latent_moments
        z = (latents * deviation + mean).to(weights_dtype(self.vae))
        pixels = self.vae.decode(z, return_dict=False)[0].float()
        return (pixels / 2).add_(0.5).clamp_(0, 1)

    @cached_property
    def _latent_moments(self) -> tuple[Tensor, Tensor]:
        return latent_moments(self.vae)


def has_tiles(vae: AutoencoderKL, factor: int) -> bool:
    """Whether tiles, as diffusers cuts them, make a whole picture again: it counts latents and pixels apart.

    Each is rounded down, so tiles of some sizes would leave gaps, and one whose sides differ it cannot count.
    """
    cells, pixels, overlap = vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor
    if not isinstance(pixels, int):
        return False
    steps = [int(side * (1 - overlap)) for side in (cells, pixels)]  # from one tile to the next
    kept = [side - int(side * overlap) for side in (cells, pixels)]  # of each tile
    return steps[0] > 0 and [kept[1], steps[1]] == [steps[0] * factor, kept[0] * factor]


def latent_moments(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, C, 1, 1) of what an autoencoder itself says, by which its latents are normed."""
    config, channels = vae.config, vae.config.latent_channels
    mean, deviation = config.latents_mean or [0.0] * channels, config.latents_std or [1.0] * channels
    moments = to_device(torch.tensor([mean, deviation]).reshape(2, 1, channels, 1, 1), vae.device)
    return moments[0], moments[1] / config.scaling_factor


def to_latents(vae: AutoencoderKL, pixels: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32: the middle of what is said, normed by moments."""
    mean, deviation = moments
    return (vae.encode((pixels * 2 - 1).to(weights_dtype(vae))).latent_dist.mode().float() - mean) / deviation


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

    @property
    def pixel_channels(self) -> int:
        """Channels of the decoder's layers that are as large as the picture."""
        return self.movq.config.block_out_channels[0]

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | {"movq": self.movq}

    def posterior(self, pixels: Tensor) -> Posterior:
        """What the autoencoder says of pixels (3, H, W) in [0, 1]; it is sure."""
        return Posterior(self.encode(pixels[None].to(self.device))[0])

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32; they are not scaled."""
        return self.movq.encode((pixels * 2 - 1).to(weights_dtype(self.movq)), return_dict=False)[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        pixels = self.movq.decode(latents.to(weights_dtype(self.movq)), force_not_quantize=True, return_dict=False)[
            0
        ].float()
        return (pixels / 2).add_(0.5).clamp_(0, 1)
