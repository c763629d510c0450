"""Stable unCLIP, which is also the layout of this project's own models.

The UNet reads the prompt's text tokens by cross-attention and a noised CLIP image embedding through its class
input; the embedding comes from a prior, from the caller, or is left out (zeros). Null is the empty (or
negative) prompt with zeros over the whole class input. `StableUnCLIP` is the wall to those networks: it knows
no rows and no ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from clip_core.clip import CLIP
from clip_core.text import TextTower
from gen.attention import reading
from gen.checkpoint import CARD, Card, Parts
from gen.conditioning import Condition, Conditions, Table
from gen.engine import Engine
from gen.prior import Prior
from gen.request import Abilities, Candidate, Settings, check_settings
from gen.scheduler import NoiseLevels
from samplers.noise import noise

CLASSES = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")

# What diffusers' StableUnCLIPPipeline paints with when it is told nothing.
STOCK_DEFAULTS = {
    "num_inference_steps": 20,
    "guidance_scale": 10.0,
    "prior_num_inference_steps": 25,
    "prior_guidance_scale": 4.0,
}


@dataclass(frozen=True, eq=False, repr=False)
class StableUnCLIP:
    """A loaded Stable unCLIP model."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: TextTower
    levels: NoiseLevels
    image_normalizer: StableUnCLIPImageNormalizer
    image_noising: SchedulerMixin
    prior: Prior | None = None
    clip: CLIP | None = None  # the whole CLIP that ranks
    card: Card = Card()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, parts: Parts) -> StableUnCLIP:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        needed = ["unet", "vae", "tokenizer", "text_encoder", "scheduler", "image_normalizer"]
        needed.append("image_noising_scheduler")
        if "prior" in parts.modules:
            needed += ["prior_tokenizer", "prior_text_encoder", "prior_scheduler"]
        for name in needed:
            if name not in parts.modules:
                raise ValueError(f"model part '{parts.folder / name}' is missing from model_index.json")
        got = parts.modules
        model = cls(
            unet=got["unet"],
            vae=got["vae"],
            text=TextTower(got["tokenizer"], got["text_encoder"]),
            levels=NoiseLevels.of(got["scheduler"], str(parts.folder / "scheduler")),
            image_normalizer=got["image_normalizer"],
            image_noising=got["image_noising_scheduler"],
            clip=parts.clip,
            card=parts.card,
        )
        if "prior" in got:
            prior = Prior(
                got["prior"],
                got["prior_tokenizer"],
                got["prior_text_encoder"],
                NoiseLevels.of(got["prior_scheduler"], str(parts.folder / "prior_scheduler")),
            )
            model = replace(model, prior=prior)
        model.check(str(parts.folder))
        return model

    def check(self, where: str) -> None:
        """Refuse parts that do not fit each other (ValueError), before a network finds out."""
        width = self.embedding_width
        told = {
            "unet cross_attention_dim": (self.unet.config.cross_attention_dim, self.text.shape[1]),
            "unet class input": (self.unet.config.projection_class_embeddings_input_dim, 2 * width),
            "unet in_channels": (self.unet.config.in_channels, self.vae.config.latent_channels),
        }
        if self.prior is not None:
            told["prior embedding_dim"] = (self.prior.network.config.embedding_dim, width)
            told["prior num_embeddings"] = (
                self.prior.network.config.num_embeddings,
                self.prior.text.shape[0],
            )
        for name, (given, fitting) in told.items():
            if given != fitting:
                raise ValueError(f"{where}: {name} is {given}, but the other parts need {fitting}")
        length, positions = self.text.shape[0], self.text.encoder.config.max_position_embeddings
        if length > positions:  # transformers says 10**30 where no file says how long a text may be
            raise ValueError(f"{where}: model_max_length of the tokenizer is {length}, text_encoder has {positions}")
        try:
            check_settings(self.abilities.defaults, self.abilities)
        except ValueError as error:
            raise ValueError(f"{where}/{CARD}: {error}") from None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def embedding_width(self) -> int:
        """E of the image embedding."""
        return self.image_normalizer.config.embedding_dim

    @cached_property
    def abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        given = {**STOCK_DEFAULTS, **self.card.defaults}
        given.setdefault("prior", self.prior is not None)
        sized = Settings(height=height * self.factor, width=width * self.factor, sampler=self.levels.sampler)
        return Abilities(
            size_multiple=self.factor,
            latent_channels=self.vae.config.latent_channels,
            text_shape=self.text.shape,
            text_layers=self.text.encoder.config.num_hidden_layers,
            embedding_width=self.embedding_width,
            num_noise_levels=self.image_noising.config.num_train_timesteps,
            max_steps=self.levels.num_train_timesteps,
            prior_max_steps=0 if self.prior is None else self.prior.levels.num_train_timesteps,
            can_rank=self.clip is not None,
            defaults=sized.updated(given, CARD),
        )

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        parts = {
            "unet": self.unet,
            "vae": self.vae,
            "tokenizer": self.text.tokenizer,
            "text_encoder": self.text.encoder,
            "scheduler": self.levels.stock,
            "image_normalizer": self.image_normalizer,
            "image_noising_scheduler": self.image_noising,
        }
        if self.prior is not None:
            parts |= {
                "prior": self.prior.network,
                "prior_tokenizer": self.prior.tokenizer,
                "prior_text_encoder": self.prior.text_encoder,
                "prior_scheduler": self.prior.levels.stock,
            }
        return parts

    def latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        """(C, h, w) of a picture of these settings."""
        channels = self.vae.config.latent_channels
        return channels, settings.height // self.factor, settings.width // self.factor

    def tell(
        self,
        candidates: Sequence[Candidate],
        table: Table,
        max_rows: int | None = None,  # of the prior; None: all at once
        look: Callable[[Engine], None] | None = None,  # called after every step of the prior
    ) -> list[tuple[int, int | None]]:
        """Put the conditions of every candidate into the table; its indices (prompt, null) of each.

        The null is None where a candidate is not guided.
        """
        tokens = self._tokens(candidates)
        vectors = self._vectors(candidates, max_rows, look)
        zeros = torch.zeros(2 * self.embedding_width, dtype=self.unet.dtype, device=self.device)
        known: dict[tuple[int, int], int] = {}  # by identity: what is the same tensor is told once

        def add(words: Tensor, vector: Tensor) -> int:
            key = (id(words), id(vector))
            if key not in known:
                known[key] = table.add(Condition(words, vector))
            return known[key]

        # nulls first: evaluations come in the table's order, and those that read one text are then side by side
        nulls = [None if null is None else add(null, zeros) for _, null in tokens]
        return [(add(words, vectors.get(k, zeros)), nulls[k]) for k, (words, _) in enumerate(tokens)]

    def _tokens(self, candidates: Sequence[Candidate]) -> list[tuple[Tensor, Tensor | None]]:
        """Token states (L, D) of prompt and null, every text encoded once.

        Each is a tensor object of this call alone, even where it views another's memory: what is kept beside it
        (`gen.attention`) then goes when the table does.
        """
        asked: dict[int | None, dict[str, Tensor]] = {None: {}}
        for candidate in candidates:
            settings = candidate.settings
            if candidate.prompt_embeds is None:
                asked.setdefault(settings.clip_skip, {})[candidate.prompt] = torch.empty(0)
            if candidate.negative_prompt_embeds is None and settings.guidance_scale != 1:
                asked[None][settings.negative_prompt] = torch.empty(0)  # as in diffusers, no layer is skipped here
        for clip_skip, texts in asked.items():
            empty = {"": self._empty.to(self.device, self.unet.dtype)[:]} if clip_skip is None and "" in texts else {}
            unknown = [text for text in texts if text not in empty]
            states: Sequence[Tensor] = ()
            if unknown:
                states = self.text(unknown, clip_skip).tokens.to(self.unet.dtype).unbind(0)
            asked[clip_skip] = empty | dict(zip(unknown, states, strict=True))

        given: dict[int, Tensor] = {}

        def handed(embeds: Tensor) -> Tensor:
            return given.setdefault(id(embeds), embeds.to(self.device, self.unet.dtype)[:])

        tokens: list[tuple[Tensor, Tensor | None]] = []
        for candidate in candidates:
            settings, words, null = (
                candidate.settings,
                candidate.prompt_embeds,
                candidate.negative_prompt_embeds,
            )
            said = asked[settings.clip_skip][candidate.prompt] if words is None else handed(words)
            if settings.guidance_scale == 1:
                tokens.append((said, None))
            else:
                tokens.append((said, asked[None][settings.negative_prompt] if null is None else handed(null)))
        return tokens

    @cached_property
    @torch.no_grad()
    def _empty(self) -> Tensor:
        """Token states (L, D) of the empty prompt, which most pictures are guided away from."""
        return self.text([""]).tokens[0]

    def _vectors(
        self, candidates: Sequence[Candidate], max_rows: int | None, look: Callable[[Engine], None] | None
    ) -> dict[int, Tensor]:
        """Class input (2E,) of the candidates that have an image embedding: the prior's, or the caller's."""
        embeds: dict[int, Tensor] = {
            index: candidate.image_embeds.to(self.device, torch.float32)
            for index, candidate in enumerate(candidates)
            if candidate.image_embeds is not None
        }
        asking = [index for index, candidate in enumerate(candidates) if candidate.settings.prior]
        if asking:
            assert self.prior is not None, "a request for a prior is refused where there is none"
            sampled = self.prior.sample([candidates[index] for index in asking], max_rows, look)
            embeds |= dict(zip(asking, sampled.unbind(0), strict=True))
        if not embeds:
            return {}
        indices = sorted(embeds)
        seeds = [candidates[index].seed for index in indices]
        levels = torch.tensor([candidates[index].settings.noise_level for index in indices])
        fresh = noise(seeds, "image_noise", 0, (self.embedding_width,)).to(self.device)
        vectors = self.noise_image_embeddings(torch.stack([embeds[index] for index in indices]), levels, fresh)
        return dict(zip(indices, vectors.to(self.unet.dtype).unbind(0), strict=True))

    def noise_image_embeddings(self, image_embeds: Tensor, noise_level: Tensor, noise: Tensor) -> Tensor:
        """Noised embedding (B, E) beside its level's sinusoids: (B, 2E), the UNet's class input.

        As diffusers' `noise_image_embeddings`: the noise is added in normalised units. noise_level (B,) int.
        """
        level = noise_level.to(image_embeds.device)
        mean, std = self.image_normalizer.mean.float(), self.image_normalizer.std.float()
        noised = self.image_noising.add_noise((image_embeds - mean) / std, timesteps=level, noise=noise)
        told = get_timestep_embedding(level, image_embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noised * std + mean, told.to(noised.dtype)], dim=1)

    def call(self, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        """The wall to diffusers: (M, C, h, w) noisy latents -> the network's own output."""
        return self.unet(
            x.to(self.unet.dtype),
            timestep,
            encoder_hidden_states=told.tokens,
            class_labels=told.vector,
            cross_attention_kwargs=reading(self.unet, told.distinct_tokens),
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        z = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = self.vae.decode(z, return_dict=False)[0].float()
        return (pixels / 2 + 0.5).clamp(0, 1)
