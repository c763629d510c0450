"""A model as an engine asks it; `gen.families` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from clip_core.clip import CLIP
from gen.candidate import Candidate
from gen.conditioning import Condition, ConditionPair, Conditions, Table
from gen.drafter import Drafter
from gen.prior import Prior
from gen.scheduler import NoiseLevels
from gen.settings import Abilities, Settings
from gen.upscale import Upscaler


class Family(Protocol):
    """What a family of checkpoints answers."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""

    @property
    def abilities(self) -> Abilities:
        """What a request may ask for."""

    @property
    def levels(self) -> NoiseLevels:
        """The decoder's."""

    @property
    def prior(self) -> Prior | None:
        """None: there is none."""

    @property
    def upscaler(self) -> Upscaler | None:
        """What paints large pictures from the decoder's; None: these are the pictures."""

    @property
    def clip(self) -> CLIP | None:
        """The CLIP that ranks; None: there is none."""

    @property
    def drafter(self) -> Drafter | None:
        """What paints drafts; None: the decoder does."""

    def latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        """(C, h, w) of what the decoder paints for a picture of these settings."""

    def encode_prompts(self, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
        """What each candidate is told before any prior has spoken."""

    def between(self, start: Condition, end: Condition, share: float) -> Condition:
        """What it is told a share of the way from one text to another."""

    def call(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """The decoder's network."""

    def decode(self, latents: Tensor) -> Tensor:
        """What the last stage, or the decoder, has painted (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""

    def preview(self, latents: Tensor) -> Tensor:
        """The same, cheaply and roughly."""

    def is_small(self, settings: Settings) -> bool:
        """Whether pictures are so small that a search may look at them by `decode` itself."""


@runtime_checkable
class WithTiles(Protocol):
    """A family whose autoencoder can go tile by tile."""

    @property
    def tiled(self) -> Family:
        """The same, whose autoencoder does."""


def tiling(model: Family, is_tiled: bool) -> Family:
    """The model as it goes between latents and pixels: whole, or tile by tile."""
    if not is_tiled:
        return model
    assert isinstance(model, WithTiles), "vae_tiling is refused by a model that has no tiles"
    return model.tiled


@runtime_checkable
class WithImage(Protocol):
    """A family that takes image embeddings, as every family with a prior does."""

    def add_image_embeds(
        self, candidates: Sequence[Candidate], conditions: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """What candidates are told, with an image embedding (E,) beside it."""
