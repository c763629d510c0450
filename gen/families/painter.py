"""What the families share: a UNet that reads text by cross-attention.

`Painter` is the wall to that network. It turns candidates into what the UNet is told and asks the UNet (or the weaker
one); what becomes of what it paints is another's to say. Here a base class is shorter than wrapping: a family is the
same model that says a little more, or reads its texts otherwise, and each of the few methods it says that in is marked
as a family's own. It knows no rows and no ranking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from clip_core.clip import CLIP
from clip_core.text import TextTower
from gen.attention import reading
from gen.checkpoint import CARD, Card, Parts
from gen.conditioning import Asks, Condition, Conditions, Table, Told
from gen.dispatch import dispatched
from gen.model import WithImage
from gen.prior import Prior
from gen.request import Candidate
from gen.rows import Network
from gen.scheduler import NoiseLevels
from gen.settings import JSON, Abilities, Settings, check_settings
from gen.upscale import Upscaler

# What a UNet takes and says: those of a weaker UNet have to be the model's own.
OUTSIDE = (
    *("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"),
    *("class_embed_type", "addition_embed_type"),
)


class Words(NamedTuple):
    """What a candidate is told in words; all who are told equal ones share a condition."""

    text: str
    clip_skip: int | None = None  # layers of the text tower left out
    sizes: tuple[int, ...] = ()  # of the picture, as the UNet is told them; empty: it is not


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Painter(ABC):
    """A loaded model of any family."""

    unet: UNet2DConditionModel
    text: TextTower
    levels: NoiseLevels
    clip: CLIP | None = None  # the whole CLIP that ranks
    weak: UNet2DConditionModel | None = None  # a weaker UNet of the same shape outside, for autoguidance
    card: Card = Card()  # noqa: RUF009 - frozen

    SAVED_AS: ClassVar[str]  # the pipeline class of model_index.json, where there is one for all
    STOCK_DEFAULTS: ClassVar[dict[str, Any]]  # what that class paints with when it is told nothing

    # --- a family's own ------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """C of what the UNet paints."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""

    @abstractmethod
    def preview(self, latents: Tensor) -> Tensor:
        """The same, cheaply and roughly."""

    @abstractmethod
    def is_small(self, settings: Settings) -> bool:
        """Whether a search may look at pictures of these settings by `decode` itself."""

    @property
    def prior(self) -> Prior | None:
        """What turns a text into an image embedding first; None: nothing does."""
        return None

    @property
    def upscaler(self) -> Upscaler | None:
        """What paints large pictures from the UNet's; None: nothing does."""
        return None

    @property
    def index(self) -> dict[str, JSON]:
        """What model_index.json says beside the parts."""
        return {}

    @property
    def saved_as(self) -> str:
        """The pipeline class of model_index.json."""
        return self.SAVED_AS

    @property
    def text_width(self) -> int:
        """D of the token states that the UNet reads."""
        return self.text.shape[1]

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return {
            "unet": self.unet,
            "tokenizer": self.text.tokenizer,
            "text_encoder": self.text.encoder,
            "scheduler": self.levels.stock,
        }

    def fits(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        return {
            "unet cross_attention_dim": (self.unet.config.cross_attention_dim, self.text_width),
            "unet in_channels": (self.unet.config.in_channels, self.latent_channels),
        }

    def able(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        sized = Settings(height=height * self.factor, width=width * self.factor, sampler=self.levels.sampler)
        return Abilities(
            size_multiple=self.factor,
            cell_size=self.factor,
            latent_channels=self.latent_channels,
            text_shape=(self.text.shape[0], self.text_width),
            text_layers=self.text.encoder.config.num_hidden_layers,
            embedding_width=None,
            num_noise_levels=0,
            max_steps=self.levels.num_train_timesteps,
            prior_max_steps=0,
            super_res_max_steps=0 if self.upscaler is None else self.upscaler.levels.num_train_timesteps,
            can_rank=self.clip is not None,
            can_autoguide=self.weak is not None,
            defaults=sized.updated({**self.STOCK_DEFAULTS, **self.card.defaults}, CARD),
        )

    def read(self, texts: Sequence[str], clip_skip: int | None) -> list[Condition]:
        """What the UNet is told of each of these texts."""
        return [self.handed(tokens) for tokens in self.text(texts, clip_skip).tokens]

    def handed(self, tokens: Tensor, pooled: Tensor | None = None) -> Condition:
        """What the UNet is told of a text with these token states (L, D), and where it takes it pooled, (P,)."""
        return Condition(own(tokens, self.unet))

    def sizes(self, settings: Settings) -> tuple[int, ...]:
        """What the UNet is told of a picture's size; empty: nothing."""
        return ()

    def said(self, told: Conditions) -> dict[str, Any]:
        """What the UNet is told beside the token states, by the names of its arguments."""
        return {}

    # --- what all share ------------------------------------------------------------------------------------------

    def check(self, where: str) -> None:
        """Refuse parts that do not fit each other (ValueError), before a network finds out."""
        for name, (given, fitting) in self.fits().items():
            if given != fitting:
                raise ValueError(f"{where}: {name} is {given}, but the other parts need {fitting}")
        check_length(self.text, where, "text_encoder")
        try:
            check_settings(self.abilities.defaults, self.abilities)
        except ValueError as error:
            raise ValueError(f"{where}/{CARD}: {error}") from None

    def with_weak(self, weak: UNet2DConditionModel, where: str) -> Self:
        """The same with a weaker UNet for autoguidance; ValueError where it does not take or say what the UNet does."""
        for name in OUTSIDE:
            given, fitting = getattr(weak.config, name), getattr(self.unet.config, name)
            if given != fitting:
                raise ValueError(f"weak_unet '{where}': {name} is {given}, but the model's UNet has {fitting}")
        return replace(self, weak=weak)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    @cached_property
    def abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        return self.able()

    def latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        """(C, h, w) of a picture of these settings."""
        return self.latent_channels, settings.height // self.factor, settings.width // self.factor

    def tell(self, candidates: Sequence[Candidate], table: Table) -> list[Told]:
        """What each candidate is told in words."""
        handed: dict[int, Condition] = {}  # by identity
        for one in candidates:
            prompt, null = one.prompt_embeds, one.negative_prompt_embeds
            for embeds, pooled in ((prompt, one.pooled_prompt_embeds), (null, one.negative_pooled_prompt_embeds)):
                if embeds is not None and id(embeds) not in handed:
                    handed[id(embeds)] = self._sized(self.handed(embeds, pooled), self.sizes(one.settings))
        asked = dict.fromkeys(words for candidate in candidates for words in self._read_for(candidate))
        said = table.of(list(asked), self._encoded)

        def told(embeds: Tensor | None, words: Words) -> Condition:
            return said[words] if embeds is None else handed[id(embeds)]

        return [
            (
                told(one.prompt_embeds, self._prompt_of(one)),
                None if one.settings.guidance_scale == 1 else told(one.negative_prompt_embeds, self._null_of(one)),
            )
            for one in candidates
        ]

    def _prompt_of(self, candidate: Candidate) -> Words:
        settings = candidate.settings
        return Words(candidate.prompt, settings.clip_skip, self.sizes(settings))

    def _null_of(self, candidate: Candidate) -> Words:
        """What it is guided away from; as in diffusers, no layer is skipped here."""
        settings = candidate.settings
        return Words(settings.negative_prompt, None, self.sizes(settings))

    def _read_for(self, candidate: Candidate) -> Iterator[Words]:
        """What the text tower has to read for this candidate."""
        if candidate.prompt_embeds is None:
            yield self._prompt_of(candidate)
        if candidate.negative_prompt_embeds is None and candidate.settings.guidance_scale != 1:
            yield self._null_of(candidate)

    def _encoded(self, words: Sequence[Words]) -> list[Condition]:
        """The conditions of these words; one call of the text tower for each `clip_skip`."""
        asked = dict.fromkeys((each.text, each.clip_skip) for each in words)
        found: dict[tuple[str, int | None], Condition] = {("", None): self._empty} if ("", None) in asked else {}
        for clip_skip in dict.fromkeys(skip for _, skip in asked):
            texts = [text for text, skip in asked if skip == clip_skip and (text, skip) not in found]
            if texts:
                read = self.read(texts, clip_skip)
                found |= {(text, clip_skip): condition for text, condition in zip(texts, read, strict=True)}
        return [self._sized(found[each.text, each.clip_skip].twin(), each.sizes) for each in words]

    def _sized(self, condition: Condition, sizes: tuple[int, ...]) -> Condition:
        if not sizes:
            return condition
        return replace(condition, sizes=torch.tensor(sizes, dtype=self.unet.dtype, device=self.device))

    @cached_property
    @torch.no_grad()
    def _empty(self) -> Condition:
        """The empty prompt, which most pictures are guided away from; encoded once."""
        return self.read([""], None)[0]

    def call(self, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        """The wall to diffusers: (M, C, h, w) noisy latents -> the network's own output, or the weaker network's."""
        networks: dict[Asks, Network] = {"own": partial(self._asked, self.unet)}
        if self.weak is not None:
            networks["weak"] = partial(self._asked, self.weak)
        return dispatched(networks, x, timestep, told)

    def _asked(self, network: UNet2DConditionModel, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        """What a UNet says of (M, C, h, w) noisy latents."""
        return network(
            x.to(network.dtype),
            timestep,
            encoder_hidden_states=told.tokens,
            cross_attention_kwargs=reading(network, told.distinct_tokens, torch.stack),
            return_dict=False,
            **self.said(told),
        )[0]


def with_images(
    model: WithImage, candidates: Sequence[Candidate], told: Sequence[Told], device: torch.device
) -> list[Told]:
    """What candidates are told, those that come with an image embedding with that beside their words."""
    shown = {place: one.image_embeds for place, one in enumerate(candidates) if one.image_embeds is not None}
    with_it = list(told)
    if shown:
        embeds = [each.to(device, torch.float32) for each in shown.values()]
        prompts = model.show([candidates[place] for place in shown], [told[place][0] for place in shown], embeds)
        for place, prompt in zip(shown, prompts, strict=True):
            with_it[place] = (prompt, told[place][1])
    return with_it


def listed(parts: Parts, names: Sequence[str]) -> Mapping[str, Any]:
    """The modules of a folder; ValueError where one of `names` is missing."""
    for name in names:
        if name not in parts.modules:
            raise ValueError(f"model part '{parts.folder / name}' is missing from model_index.json")
    return parts.modules


def check_length(text: TextTower, where: str, name: str) -> None:
    """ValueError for a tokenizer that lets texts be longer than the text tower reads."""
    length, positions = text.shape[0], text.encoder.config.max_position_embeddings
    if length > positions:  # transformers says 10**30 where no file says how long a text may be
        raise ValueError(f"{where}: model_max_length of the tokenizer is {length}, {name} has {positions}")


def own(tensor: Tensor, network: UNet2DConditionModel) -> Tensor:
    """As the network takes it, and an object of its own even where it views another's memory.

    What is kept beside it (`gen.attention`) then goes when this object does, whoever else keeps the memory.
    """
    return tensor.to(network.device, network.dtype)[:]
