"""Stable unCLIP, which is also the layout of this project's own models.

The UNet reads the prompt's text tokens by cross-attention and a noised CLIP image embedding through its class
input; the embedding comes from a prior, from the caller, or is left out (zeros). Null is the empty (or
negative) prompt with zeros over the whole class input. `StableUnCLIP` is the wall to those networks: it knows
no rows and no ranking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from gen.conditioning import Condition, Conditions, Table, Told
from gen.preview import SMALL, Preview, fitted
from gen.prior import Prior
from gen.request import Abilities, Candidate, Settings, check_settings
from gen.rows import sent
from gen.scheduler import NoiseLevels
from samplers.noise import noise

CLASSES = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")

Text = tuple[str, int | None]
"""A text and the layers of the text tower left out (`clip_skip`)"""

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
    weak: UNet2DConditionModel | None = None  # a weaker UNet of the same shape outside, for autoguidance
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

    def with_weak(self, weak: UNet2DConditionModel, where: str) -> StableUnCLIP:
        """The same with a weaker UNet for autoguidance; ValueError where it does not take or say what the UNet does."""
        for name in ("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"):
            given, fitting = getattr(weak.config, name), getattr(self.unet.config, name)
            if given != fitting:
                raise ValueError(f"weak_unet '{where}': {name} is {given}, but the model's UNet has {fitting}")
        return replace(self, weak=weak)

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
            can_autoguide=self.weak is not None,
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

    def tell(self, candidates: Sequence[Candidate], table: Table) -> list[Told]:
        """What each candidate is told before any prior has spoken: its words, and the image embedding it came with."""
        zeros = torch.zeros(2 * self.embedding_width, dtype=self.unet.dtype, device=self.device)
        handed: dict[int, Condition] = {}  # by identity
        for candidate in candidates:
            for embeds in (candidate.prompt_embeds, candidate.negative_prompt_embeds):
                if embeds is not None and id(embeds) not in handed:
                    handed[id(embeds)] = Condition(own(embeds, self.unet), zeros)
        asked = dict.fromkeys(name for candidate in candidates for name in texts_of(candidate))
        said = table.of(list(asked), lambda names: self._encoded(names, zeros))

        def told(embeds: Tensor | None, name: Text) -> Condition:
            return said[name] if embeds is None else handed[id(embeds)]

        prompts = [told(one.prompt_embeds, prompt_of(one)) for one in candidates]
        shown = [index for index, one in enumerate(candidates) if one.image_embeds is not None]
        if shown:
            given = [one.image_embeds for one in candidates if one.image_embeds is not None]
            pictures = [each.to(self.device, torch.float32) for each in given]
            pictured = self.show([candidates[k] for k in shown], [prompts[k] for k in shown], pictures)
            for index, condition in zip(shown, pictured, strict=True):
                prompts[index] = condition
        nulls = [
            None if one.settings.guidance_scale == 1 else told(one.negative_prompt_embeds, null_of(one))
            for one in candidates
        ]
        return list(zip(prompts, nulls, strict=True))

    def show(
        self, candidates: Sequence[Candidate], told: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """What each candidate is told in words, with an image embedding (E,) beside it, noised as its settings say."""
        levels = sent(torch.tensor([one.settings.noise_level for one in candidates]), self.device)
        seeds = [one.first_seed for one in candidates]
        fresh = sent(noise(seeds, "image_noise", 0, (self.embedding_width,)), self.device)
        vectors = self.noise_image_embeddings(torch.stack(list(image_embeds)), levels, fresh).to(self.unet.dtype)
        return [replace(each, vector=vector) for each, vector in zip(told, vectors, strict=True)]

    def _encoded(self, names: Sequence[Text], zeros: Tensor) -> list[Condition]:
        """Texts without an image embedding; one call of the text tower for each `clip_skip`."""
        found: dict[Text, Tensor] = {("", None): self._empty} if ("", None) in names else {}
        for clip_skip in dict.fromkeys(skip for _, skip in names):
            texts = [text for text, skip in names if skip == clip_skip and (text, skip) not in found]
            if texts:
                states = self.text(texts, clip_skip).tokens
                found |= {(text, clip_skip): tokens for text, tokens in zip(texts, states, strict=True)}
        return [Condition(own(found[name], self.unet), zeros) for name in names]

    @cached_property
    @torch.no_grad()
    def _empty(self) -> Tensor:
        """Token states (L, D) of the empty prompt, which most pictures are guided away from."""
        return self.text([""]).tokens[0]

    def noise_image_embeddings(self, image_embeds: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Noised embedding (B, E) beside the sinusoids of its level (B,): (B, 2E), the UNet's class input.

        As diffusers' `noise_image_embeddings`: the noise is added in normalised units. All on one device.
        """
        mean, std = self.image_normalizer.mean.float(), self.image_normalizer.std.float()
        noised = self.image_noising.add_noise((image_embeds - mean) / std, timesteps=level, noise=noise)
        told = get_timestep_embedding(level, image_embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noised * std + mean, told.to(noised.dtype)], dim=1)

    def call(self, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        """The wall to diffusers: (M, C, h, w) noisy latents -> the network's own output, or the weaker network's."""
        weak = [condition.weak for condition in told.each]
        if not any(weak):
            return asked(self.unet, x, timestep, told)
        assert self.weak is not None, "autoguidance is refused where there is no weaker network"
        order = sorted(range(len(weak)), key=weak.__getitem__)  # those that the UNet itself is asked, then the others
        first = len(weak) - sum(weak)
        answers = []
        for network, places in ((self.unet, order[:first]), (self.weak, order[first:])):
            if places:
                at = sent(torch.tensor(places), x.device)
                answers.append(asked(network, x[at], timestep[at], Conditions(tuple(told.each[k] for k in places))))
        return torch.cat(answers)[sent(torch.tensor(order).argsort(), x.device)]

    def preview(self, latents: Tensor) -> Tensor:
        """The same, cheaply and roughly; see `gen.preview`."""
        return self._look(latents)

    def is_small(self, settings: Settings) -> bool:
        """Whether a search may look at pictures of these settings through the autoencoder itself."""
        return settings.height * settings.width <= SMALL

    @cached_property
    def _look(self) -> Preview:
        defaults = self.abilities.defaults
        return fitted(self.encode, self.decode, defaults.height, defaults.width, self.factor, self.device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32."""
        posterior = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mode().float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        z = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = self.vae.decode(z, return_dict=False)[0].float()
        return (pixels / 2 + 0.5).clamp(0, 1)


def asked(network: UNet2DConditionModel, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
    """What a UNet says of (M, C, h, w) noisy latents."""
    return network(
        x.to(network.dtype),
        timestep,
        encoder_hidden_states=told.tokens,
        class_labels=told.vector,
        cross_attention_kwargs=reading(network, told.distinct_tokens),
        return_dict=False,
    )[0]


def prompt_of(candidate: Candidate) -> Text:
    """What its text tower reads as the prompt."""
    return candidate.prompt, candidate.settings.clip_skip


def null_of(candidate: Candidate) -> Text:
    """What it is guided away from; as in diffusers, no layer is skipped here."""
    return candidate.settings.negative_prompt, None


def texts_of(candidate: Candidate) -> Iterator[Text]:
    """What the text tower has to read for this candidate."""
    if candidate.prompt_embeds is None:
        yield prompt_of(candidate)
    if candidate.negative_prompt_embeds is None and candidate.settings.guidance_scale != 1:
        yield null_of(candidate)


def own(tensor: Tensor, network: UNet2DConditionModel) -> Tensor:
    """As the network takes it, and an object of its own even where it views another's memory.

    What is kept beside it (`gen.attention`) then goes when this object does, whoever else keeps the memory.
    """
    return tensor.to(network.device, network.dtype)[:]
