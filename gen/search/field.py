"""What a search sees of a prompt's candidates, and what it may ask for: one interface for all searches.

A search is a generator over one prompt. It yields how far which candidates are to be taken and goes on when all of
these are there; what needs no waiting it asks of the `Field`. It is resumed when its own candidates have come where
they should, whatever else shares the network calls, so what it decides never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Go:
    """Take candidates on, each from where it stands."""

    candidates: Sequence[int]
    until: int | None = None  # steps of the decoder taken by then; None: painted and scored


@dataclass(frozen=True)
class Scout:
    """Paint a draft of candidates, from their own noise, in so many steps; nothing of it but its look is kept."""

    candidates: Sequence[int]
    num_inference_steps: int | None = None  # of the decoder; None: those of the model's network for drafts


Move: TypeAlias = Go | Scout
Moves: TypeAlias = Generator[Move, None, None]
"""A search at work; candidates that are not painted when it ends are given up"""


class Field(Protocol):
    """One prompt's candidates, by their numbers."""

    @property
    def candidates(self) -> Sequence[int]:
        """Those to search among, in drawing order."""

    @property
    def keep(self) -> int:
        """How many the user wants in the end."""

    @property
    def seed(self) -> int:
        """The first candidate's, from which a search draws what else it needs."""

    @property
    def num_steps(self) -> int:
        """Steps of the decoder from the noise to a picture."""

    @property
    def has_drafter(self) -> bool:
        """Whether the model has a network for drafts that follows what is asked."""

    @property
    def scores(self) -> Mapping[int, float]:
        """CLIP's cosine of those of them that are painted; the device is waited for."""

    @property
    def sharpness(self) -> float:
        """What CLIP multiplies a cosine by to get the logarithm of a likelihood: 1 / its temperature."""

    def previews(self, candidates: Sequence[int]) -> list[float]:
        """CLIP's cosine of a cheap look at their latest clean estimates; the device is waited for."""

    def drop(self, candidates: Sequence[int]) -> None:
        """Give up candidates that are not painted; their places in the batch are free at once."""

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let targets go on from where the source has halted, each by its own seed's noise."""

    def turn(self, source: int, targets: Sequence[int], share: float) -> None:
        """Let targets, which have not begun, begin near where the source began.

        The start is sqrt(1 - share^2) of the source's and `share` of the target's own.
        """

    def seconds_left(self) -> float:
        """Of the budget; infinity where there is none."""

    def among(self, candidates: Sequence[int]) -> Field:
        """The same prompt with these candidates alone to search among."""


@dataclass(frozen=True)
class SearchContext:
    """What a search is to work on, before any work."""

    num_candidates: int  # of each prompt
    keep: int
    is_noisy: bool  # whether the sampler adds fresh noise at its steps
    has_latents: bool  # whether the caller handed in the noise to begin with


class Search(Protocol):
    """Which candidates of a prompt go on; `gen.search.rules` has them."""

    @property
    def name(self) -> str:
        """As users call it."""

    def check(self, asked: SearchContext) -> None:
        """Refuse what it cannot work on (ValueError)."""

    def __call__(self, field: Field) -> Moves:
        """Search among one prompt's candidates."""
