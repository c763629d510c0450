"""Train the decoder: a UNet that paints latents from text tokens, an image embedding, or both.

The network is diffusers' UNet2DConditionModel in the Stable unCLIP layout. Each example drops its text, its image
embedding or both at random (Ho & Salimans 2022), so one decoder serves text alone, the unCLIP way (Ramesh et al. 2022)
and guidance. The loss is weighted by Min-SNR-gamma (Hang et al. 2023); beside it the UNet's middle features may be led
towards CLIP's patch tokens (alignment.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from clip_core.text import TextTower
from gen.families.stable_unclip import StableUnCLIP
from gen.pipeline import TextToImage
from gen.scheduler import NoiseLevels
from training.alignment import Aligned, misalignment
from training.attention import AttentionRecipe, use_attention
from training.checkpoints import load_weights
from training.data.pictures import Pictures
from training.frozen import (
    default_device,
    image_embeddings,
    image_patches,
    latents,
    load_clip,
    load_vae,
    reads,
    transformers_model,
)
from training.recipe import RecipeError, Section, built, options_of
from training.sheets import captioned
from training.task import Task, validation_size

FILLED_IN = (  # options of the UNet that CLIP and the autoencoder decide
    *("in_channels", "out_channels", "cross_attention_dim"),
    *("class_embed_type", "projection_class_embeddings_input_dim"),
)


class Kinds(Section):
    """How often the decoder sees which conditions; the shares sum to one."""

    both: float = Field(default=0.40, ge=0)  # text and image
    text: float = Field(default=0.40, ge=0)  # text and zeros
    image: float = Field(default=0.10, ge=0)  # the empty prompt and image
    none: float = Field(default=0.10, ge=0)  # the empty prompt and zeros: what guidance takes as null

    @model_validator(mode="after")
    def _sums_to_one(self) -> Kinds:
        total = self.both + self.text + self.image + self.none
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of kinds sum to {total:g}; they must sum to 1")
        return self


class DecoderRecipe(AttentionRecipe):
    """Keys of a recipe with `task: decoder`."""

    task: Literal["decoder"]
    clip: str  # the folder of a trained CLIP
    vae: str  # the folder of a trained autoencoder
    resolution: int = Field(gt=0)  # pixels
    network: Annotated[  # UNet2DConditionModel's configuration; what follows from CLIP and VAE is filled in
        dict[str, Any], options_of(UNet2DConditionModel, FILLED_IN)
    ]
    scheduler: Annotated[dict[str, Any], options_of(DDIMScheduler)]  # betas and prediction_type
    snr_gamma: float | None = Field(5.0, gt=0)  # None: every noise level weighs the same
    kinds: Kinds = Field(default_factory=Kinds)
    noised_share: float = Field(0.5, ge=0, le=1)  # of image embeddings that are noised to a random level
    max_noise_level: int = Field(500, ge=0, lt=1000)
    align_weight: float = Field(0.0, ge=0)  # of the middle features' distance from CLIP's patches; 0: not aligned


Item = tuple[Tensor, Tensor, Tensor, str]
"""Latent (C, h, w), image embedding (E,), CLIP's patch tokens (P, D), or (0,) where none are asked for; caption."""


class Encoded(Dataset[Item]):
    """What frozen networks make of every picture, and its caption."""

    def __init__(self, dataset: Pictures, latents: Tensor, embeddings: Tensor, patches: Tensor) -> None:
        self.captions = [example.text for example in dataset.examples]
        self.latents, self.embeddings, self.patches = latents, embeddings, patches

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Item:
        return self.latents[index], self.embeddings[index], self.patches[index], self.captions[index]


class DecoderTask(Task[Aligned]):
    """The weighted error of the network's own output at uniformly drawn timesteps."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        clip, self.vae = load_clip(recipe.clip, default_device()), load_vae(recipe.vae, default_device())
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if recipe.resolution % factor:
            raise RecipeError(
                f"resolution is {recipe.resolution} and the autoencoder in {recipe.vae} divides it by {factor};"
                f" choose a multiple of {factor}"
            )
        self.clip_model = transformers_model(clip)
        use_attention(self.clip_model, recipe.attention)
        pictures = Pictures(recipe.data, recipe.resolution)
        self.skipped, self.reads = pictures.skipped, reads(pictures, recipe.clip, recipe.vae)
        embeddings = image_embeddings(pictures, clip, recipe.clip)
        patches = torch.empty(len(pictures), 0)
        if recipe.align_weight:
            patches = image_patches(pictures, clip, recipe.clip)
        self.dataset: Encoded = Encoded(pictures, latents(pictures, self.vae, recipe.vae), embeddings, patches)
        self.num_validation = validation_size(len(self.dataset))
        torch.manual_seed(recipe.train.seed)
        unet = _unet(recipe, self.vae.config.latent_channels, embeddings.shape[1], self.clip_model.config)
        if recipe.align_weight and unet.mid_block is None:
            raise RecipeError("align_weight needs a network with a middle block; set it to 0 or give a mid_block_type")
        use_attention(unet, recipe.attention)
        self.network = Aligned(unet, patches.shape[-1] if recipe.align_weight else None)
        width = embeddings.shape[1]
        self.normalizer = StableUnCLIPImageNormalizer(width).requires_grad_(False)
        self.normalizer.mean.copy_(embeddings.mean(dim=0, keepdim=True))
        self.normalizer.std.copy_(embeddings.std(dim=0, keepdim=True).clamp(min=1e-6))
        self.image_noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.levels = NoiseLevels.of(built(DDIMScheduler, "scheduler", recipe.scheduler), "recipe key 'scheduler'")
        self.text = TextTower(clip.tokenizer, self.clip_model.text_model)

    def model(self, unet: UNet2DConditionModel) -> StableUnCLIP:
        """The decoder as a model that paints, without a prior."""
        return StableUnCLIP(
            unet=unet,
            vae=self.vae,
            text=self.text,
            levels=self.levels,
            image_normalizer=self.normalizer,
            image_noising=self.image_noising,
        )

    def start_from(self, folder: Path) -> None:
        """The weights of a UNet; what aligns it always starts anew."""
        load_weights(self.network.unet, folder)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor, list[str]], rng: torch.Generator) -> dict[str, Tensor]:
        """The loss at random timesteps and conditions; `error` is the same unweighted."""
        x0, embeddings, patches, captions = batch  # (B, C, h, w), (B, E), (B, P, D), B
        rows, device = len(captions), x0.device
        with_text, with_image = self._draw_kinds(rows, rng)
        with torch.no_grad():
            words = [text if kept else "" for text, kept in zip(captions, with_text.tolist(), strict=True)]
            distinct = list(dict.fromkeys(words))  # the empty prompt is encoded once
            tokens = self.text(distinct).tokens[[distinct.index(text) for text in words]]  # (B, L, D)
            vector = self._class_input(embeddings, rng) * with_image[:, None]  # (B, 2E); zeros are the null
        scaling = self.levels.scaling
        timestep = torch.randint(self.levels.num_train_timesteps, (rows,), generator=rng, device=device)
        sigma = scaling.sigma(timestep)
        eps = torch.randn(x0.shape, generator=rng, device=device)
        x = x0 + sigma.reshape(-1, 1, 1, 1) * eps
        output, seen = self.network(
            scaling.network_input(x, sigma), timestep, encoder_hidden_states=tokens, class_labels=vector
        )
        error = (output.float() - scaling.target(x0, eps, sigma)).square().mean(dim=(1, 2, 3))  # (B,)
        losses = {"error": error.mean()}
        loss = (error * scaling.loss_weight(sigma, self.recipe.snr_gamma)).mean()
        if seen is not None:
            losses["misalignment"] = misalignment(seen, patches)
            loss = loss + self.recipe.align_weight * losses["misalignment"]
        return {"loss": loss, **losses}

    def measure(self, network: Aligned) -> dict[str, float]:
        """The unweighted error over held-back pictures with fixed noise."""
        return {"held_back_error": self.validation_loss(network, "error")}

    @torch.no_grad()
    def sheet(self, network: Aligned) -> Image.Image:
        """Held-back captions painted from text alone."""
        captions = [self.dataset.captions[index] for index in self.validation_indices[-24:]]
        painter = TextToImage(self.model(network.unet))
        painted = painter(captions, num_inference_steps=20, guidance_scale=4.0, seed=0, rerank=False)
        assert isinstance(painted.images, list), "they are Pillow's"
        return captioned(painted.images, captions)

    def save(self, network: Aligned, folder: Path) -> None:
        """The UNet in `folder`; what belongs to it (scheduler, image normaliser and noising) in folders inside."""
        network.unet.save_pretrained(folder)
        self.levels.stock.save_pretrained(folder / "scheduler")
        self.normalizer.save_pretrained(folder / "image_normalizer")
        self.image_noising.save_pretrained(folder / "image_noising_scheduler")

    def _draw_kinds(self, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which rows keep their text and which their image embedding, (B,) bool each."""
        kinds = self.recipe.kinds
        draw = torch.rand(rows, generator=rng, device=rng.device)
        with_text = draw < kinds.both + kinds.text
        with_image = (draw < kinds.both) | (draw >= 1 - kinds.image)
        return with_text, with_image

    def _class_input(self, embeddings: Tensor, rng: torch.Generator) -> Tensor:
        """The UNet's class input (B, 2E), some of the embeddings noised (Ho et al. 2022, "Cascaded diffusion")."""
        rows, device = len(embeddings), embeddings.device
        level = torch.randint(self.recipe.max_noise_level + 1, (rows,), generator=rng, device=device)
        level = level * (torch.rand(rows, generator=rng, device=device) < self.recipe.noised_share)
        noise = torch.randn(embeddings.shape, generator=rng, device=device)
        return self.model(self.network.unet).noise_image_embeddings(embeddings, level, noise)


def _unet(recipe: DecoderRecipe, channels: int, width: int, clip_config: Any) -> UNet2DConditionModel:
    """The recipe's UNet with what CLIP and autoencoder decide."""
    decided = dict(
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=clip_config.text_config.hidden_size,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * width,
    )
    return built(UNet2DConditionModel, "network", {**recipe.network, **decided})
