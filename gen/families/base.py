"""What the families share: a UNet, and what may be asked of a model.

`FamilyModel` is the wall to that network. It says what a request may ask for and asks the UNet (or one beside it); what
the UNet is told and what becomes of what it paints are others' to say. A family overrides a few of its methods, which
stand together as a family's own. It knows no rows and no ranking.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from clip_core.clip import CLIP
from clip_core.preprocess import Preprocess
from gen.candidate import Candidate
from gen.card import CARD, Card
from gen.checkpoint import Parts
from gen.conditioning import Condition, ConditionPair, Conditions, NetworkName, Table
from gen.dispatch import dispatched
from gen.drafter import Drafter
from gen.embeds import between
from gen.model import WithImage
from gen.prior import Prior
from gen.rows import Network
from gen.scheduler import NoiseLevels
from gen.settings import JSON, Abilities, Settings
from gen.settings_checks import check_settings
from gen.upscale import Upscaler

# What a UNet takes and says: those of one beside the model's have to be the model's own.
OUTSIDE = (
    *("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"),
    *("class_embed_type", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"),
)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FamilyModel(ABC):
    """A loaded model of any family."""

    unet: UNet2DConditionModel
    levels: NoiseLevels
    clip: CLIP | None = None  # the whole CLIP that ranks
    image_encoder: CLIPVisionModelWithProjection | None = None  # makes embeddings of pictures; None: the CLIP does
    feature_extractor: CLIPImageProcessor | None = None  # how it is shown them
    weak: UNet2DConditionModel | None = None  # a weaker UNet of the same shape outside, for autoguidance
    drafter: Drafter | None = None  # what paints drafts; None: the UNet does
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
    def stock_defaults(self) -> dict[str, Any]:
        """What stock's class paints with when it is told nothing."""
        return self.STOCK_DEFAULTS

    @property
    def clip_beside(self) -> CLIP | None:
        """What `save` puts into clip/."""
        return self.clip

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return {"unet": self.unet, "scheduler": self.levels.stock}

    def networks(self) -> list[nn.Module]:
        """What a runtime other than torch may compute (`gen.runtime`)."""
        return [*self.unets, *([] if self.clip is None else [self.clip.towers.image_network])]

    def modules(self) -> list[nn.Module]:
        """All networks that it is made of; some may share layers."""
        own = [part for part in self.parts().values() if isinstance(part, nn.Module)]
        return list(dict.fromkeys([*own, *self.unets, *([] if self.clip is None else [self.clip.model])]))

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        return {"unet in_channels": (self.unet.config.in_channels, self.latent_channels)}

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        own = Settings(
            height=height * self.factor,
            width=width * self.factor,
            sampler=self.levels.sampler,
            prior=self.prior is not None,
        )
        return Abilities(
            size_multiple=self.factor,
            cell_size=self.factor,
            latent_channels=self.latent_channels,
            embedding_width=self.embedding_width,
            num_noise_levels=0,
            max_steps=self.levels.num_train_timesteps,
            prior_max_steps=0 if self.prior is None else self.prior.levels.num_train_timesteps,
            super_res_max_steps=0 if self.upscaler is None else self.upscaler.levels.num_train_timesteps,
            can_see=self.embeds_by_clip or bool(self.image_parts),
            can_compare=self.embeds_by_clip,
            can_rank=self.clip is not None,
            can_autoguide=self.weak is not None,
            defaults=own.updated({**self.stock_defaults, **self.card.defaults}, CARD),
        )

    @property
    def embedding_width(self) -> int | None:
        """E of the image embedding that the UNet takes; None: it takes none."""
        return None

    @property
    def embeds_by_clip(self) -> bool:
        """Whether the CLIP beside the model makes embeddings as the UNet takes them, so far as their width tells."""
        config = getattr(self.clip.model, "config", None) if self.clip is not None else None
        return self.embedding_width is not None and getattr(config, "projection_dim", None) == self.embedding_width

    @property
    def image_parts(self) -> dict[str, Any]:
        """The image tower of its own and how it is shown pictures, by their names in model_index.json."""
        parts = {"image_encoder": self.image_encoder, "feature_extractor": self.feature_extractor}
        return {} if None in parts.values() else parts

    def embed_image(self, pixels: Tensor) -> Tensor:
        """The embedding (E,) float32 of pixels (3, H, W) in [0, 1], as the UNet takes it."""
        if self.image_encoder is None or self.feature_extractor is None:
            assert self.clip is not None, "a picture is refused where nothing sees it"
            return self.clip.image(pixels[None])[0].float()
        values = Preprocess.from_config(self.feature_extractor.to_dict()).from_pixels(pixels[None].to(self.device))
        return self.image_encoder(values.to(self.image_encoder.dtype)).image_embeds[0].float()

    def between(self, start: Condition, end: Condition, share: float) -> Condition:
        """What the UNet is told between two texts."""
        return between(start, end, share)

    def held_at_once(self, settings: Settings, is_decoded: bool) -> int:
        """How many numbers a network holds at once for a picture, at the least: what its first layers read and answer.

        Of one row, whatever computes it. `is_decoded`: whether pixels are made of it.
        """
        _, height, width = self.latent_shape(settings)
        return 2 * self.unet.config.block_out_channels[0] * height * width

    def with_own_texts(self) -> Self:
        """The same, with text towers that neither CLIP nor a prior shares, so that they alone can be changed.

        Nothing that was worked out of the former weights is kept.
        """
        return replace(self)

    @abstractmethod
    def encode_prompts(self, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
        """What each candidate is told before any prior has spoken."""

    @abstractmethod
    def call_unet(self, network: UNet2DConditionModel, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """What a UNet, the model's own or one beside it, says of (M, C, h, w) noisy latents."""

    # --- what all share ------------------------------------------------------------------------------------------

    def check(self, where: str) -> None:
        """Refuse parts that do not fit each other (ValueError), before a network finds out."""
        required = self.required_config()
        if self.image_encoder is not None:
            required["image_encoder projection_dim"] = (self.image_encoder.config.projection_dim, self.embedding_width)
        for name, (given, fitting) in required.items():
            if given != fitting:
                raise ValueError(f"{where}: {name} is {given}, but the other parts need {fitting}")
        try:
            check_settings(self.abilities.defaults, self.abilities)
        except ValueError as error:
            raise ValueError(f"{where}/{CARD}: {error}") from None

    def with_weak(self, weak: UNet2DConditionModel, where: str) -> Self:
        """The same with a weaker UNet for autoguidance; ValueError where it does not take or say what the UNet does."""
        self._check_outside(weak, f"weak_unet '{where}'")
        return replace(self, weak=weak)

    def with_drafter(self, drafter: Drafter, where: str) -> Self:
        """The same with a UNet for drafts; ValueError where it does not take or say what the UNet does."""
        self._check_outside(drafter.unet, f"draft_unet '{where}'")
        return replace(self, drafter=drafter)

    def _check_outside(self, unet: UNet2DConditionModel, called: str) -> None:
        for name in OUTSIDE:
            given, fitting = getattr(unet.config, name), getattr(self.unet.config, name)
            if given != fitting:
                raise ValueError(f"{called}: {name} is {given}, but the model's UNet has {fitting}")

    def unshared(self, tower: nn.Module) -> nn.Module:
        """A text tower, or a copy of it where CLIP or a prior reads by the same weights."""
        others = [self.clip.model] if self.clip is not None else []
        others += [self.prior.text_encoder] if self.prior is not None else []
        read = {weight.data_ptr() for other in others for weight in other.parameters()}
        return copy.deepcopy(tower) if any(weight.data_ptr() in read for weight in tower.parameters()) else tower

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device  # unet.device walks all modules

    @cached_property
    def abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        return self.make_abilities()

    @property
    def unets(self) -> list[UNet2DConditionModel]:
        """The model's own, the weaker one where there is one, and that of drafts."""
        others = [self.weak, None if self.drafter is None else self.drafter.unet]
        return [self.unet, *(unet for unet in others if unet is not None)]

    def latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        """(C, h, w) of a picture of these settings."""
        return self.latent_channels, settings.height // self.factor, settings.width // self.factor

    def call(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """The wall to diffusers: (M, C, h, w) noisy latents -> the output of the network that each evaluation asks."""
        networks: dict[NetworkName, Network] = {"own": partial(self.call_unet, self.unet)}
        if self.weak is not None:
            networks["weak"] = partial(self.call_unet, self.weak)
        if self.drafter is not None:
            networks["draft"] = partial(self.call_unet, self.drafter.unet)
        return dispatched(networks, x, timestep, conditions)


def with_images(
    model: WithImage, candidates: Sequence[Candidate], pairs: Sequence[ConditionPair], device: torch.device
) -> list[ConditionPair]:
    """What candidates are told, those that come with an image embedding with that beside their words."""
    shown = {place: one.image_embeds for place, one in enumerate(candidates) if one.image_embeds is not None}
    with_it = list(pairs)
    if shown:
        embeds = [each.to(device, torch.float32) for each in shown.values()]
        prompts = model.add_image_embeds(
            [candidates[place] for place in shown], [pairs[place][0] for place in shown], embeds
        )
        for place, prompt in zip(shown, prompts, strict=True):
            with_it[place] = (prompt, pairs[place][1])
    return with_it


def listed(parts: Parts, names: Sequence[str]) -> Mapping[str, Any]:
    """The modules of a folder; ValueError where one of `names` is missing."""
    for name in names:
        if name not in parts.modules:
            raise ValueError(f"model part '{parts.folder / name}' is missing from model_index.json")
    return parts.modules


def own(tensor: Tensor, network: UNet2DConditionModel) -> Tensor:
    """As the network takes it, and an object of its own even where it views another's memory.

    What is kept beside it (`gen.attention`) then goes when this object does, whoever else keeps the memory.
    """
    return tensor.to(network.conv_in.weight)[:]  # network.device and network.dtype walk all modules
