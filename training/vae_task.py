"""Train the autoencoder: pictures to latents and back (Kingma & Welling 2014; Rombach et al. 2022, section 3.1).

The network is diffusers' AutoencoderKL. After training, `scaling_factor` is measured so that latents have unit
variance, as Rombach et al. 2022, appendix G, do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from gen.sheet import contact_sheet
from training.data.pictures import Pictures
from training.frozen import load_vae
from training.recipe import Recipe, built, options_of
from training.sheets import pictures_of
from training.task import Task, validation_size


class VaeRecipe(Recipe):
    """Keys of a recipe with `task: vae`."""

    task: Literal["vae"]
    resolution: int = Field(gt=0)  # pixels; a multiple of the network's reduction
    network: Annotated[dict[str, Any], options_of(AutoencoderKL, ["sample_size"])]  # AutoencoderKL's configuration
    kl_weight: float = Field(1e-4, ge=0)  # of the mean KL of one latent value, beside the mean error of one pixel
    kl_warmup: float = Field(0.0, ge=0, lt=1)  # share of the steps over which the weight grows to it from a hundredth
    freeze_encoder: bool = False  # train the decoder alone; latents, and all that was trained on them, stay as they are

    @model_validator(mode="after")
    def _needs_start(self) -> VaeRecipe:
        if self.freeze_encoder and self.init is None:
            raise ValueError("freeze_encoder needs init, the folder of the autoencoder whose encoder it keeps")
        return self

    @model_validator(mode="after")
    def _halves(self) -> VaeRecipe:
        channels = self.network.get("block_out_channels", [0])
        if not isinstance(channels, list):
            raise ValueError(
                f"network.block_out_channels is {channels!r}; give a list, one number a halving and one more"
            )
        factor = 2 ** (len(channels) - 1)
        if self.resolution % factor:
            raise ValueError(
                f"resolution is {self.resolution} and the autoencoder divides it by {factor};"
                f" choose a multiple of {factor}"
            )
        return self


class VaeTask(Task[AutoencoderKL]):
    """Mean absolute and squared error in [-1, 1] plus a small KL divergence to the unit Gaussian."""

    def __init__(self, recipe: VaeRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.dataset: Pictures = Pictures(recipe.data, recipe.resolution)
        self.skipped, self.reads = self.dataset.skipped, self.dataset.digest
        torch.manual_seed(recipe.train.seed)
        self.network = built(AutoencoderKL, "network", {**recipe.network, "sample_size": recipe.resolution})
        if recipe.freeze_encoder:
            assert recipe.init is not None, "the recipe asks for it"
            self.network.encoder.requires_grad_(False)
            self.network.quant_conv.requires_grad_(False)
            self.network.register_to_config(scaling_factor=load_vae(recipe.init).config.scaling_factor)
        self.num_validation = validation_size(len(self.dataset))

    def forward(self, batch: tuple[Tensor, list[str]], rng: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction error, and the KL divergence of one latent value."""
        pixels = to_signed(batch[0])  # (B, 3, H, W)
        posterior = self.network.encode(pixels).latent_dist
        decoded = self.network.decode(posterior.sample(rng)).sample.float()
        error = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + self._kl_weight() * kl, "error": error, "kl": kl}

    @torch.no_grad()
    def sheet(self, network: AutoencoderKL) -> Image.Image:
        """Held-back pictures above their reconstructions."""
        pixels = self._validation_pixels(16)
        pictures = pictures_of(torch.cat([pixels, _reconstruct(network, pixels)]) / 2 + 0.5)
        return contact_sheet(pictures, columns=len(pixels))

    @torch.no_grad()
    def measure(self, network: AutoencoderKL) -> dict[str, float]:
        """Peak signal-to-noise ratio of held-back reconstructions, in dB over the range [-1, 1]."""
        pixels = self._validation_pixels(64)
        error = (_reconstruct(network, pixels) - pixels).square().mean(dim=(1, 2, 3))
        return {"psnr": (10 * torch.log10(4 / error)).mean().item()}

    @torch.no_grad()
    def save(self, network: AutoencoderKL, folder: Path) -> None:
        """The autoencoder with its `scaling_factor`: measured on held-back pictures, or kept with a frozen encoder."""
        if not self.recipe.freeze_encoder:
            latents = network.encode(self._validation_pixels(256)).latent_dist.mean
            network.register_to_config(scaling_factor=1 / latents.std().item())
        network.save_pretrained(folder)

    def _kl_weight(self) -> float:
        """Grows geometrically: under a strong weight from the start the noise hides colours and corners for long."""
        risen = self.progress / self.recipe.kl_warmup if self.recipe.kl_warmup else 1.0
        return self.recipe.kl_weight * 100 ** (min(risen, 1.0) - 1)

    def _validation_pixels(self, most: int) -> Tensor:
        return to_signed(self.batch_of(self.validation_indices[:most])[0])


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _reconstruct(network: AutoencoderKL, pixels: Tensor) -> Tensor:
    return network.decode(network.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
