"""What the networks are told, apart from x and its noise level.

A `Condition` belongs to no row: it lives once in a `Table`, and rows carry its index, so the sixteen
candidates of a prompt share one null and one encoding of their text. Nothing here knows rows, samplers or
guidance; what conditions are made of, and which numbers mean "null", is a family's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """One thing a network can be told; what is None, this network does not take."""

    tokens: Tensor | None = None  # (L, D), cross-attended
    vector: Tensor | None = None  # (V,), the UNet's class input or the prior's text embedding
    mask: Tensor | None = None  # (L,) bool, True where there is text


@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditions gathered for one network call of M evaluations.

    A network that takes a tensor per evaluation reads `tokens`, `vector` and `mask`; what can be worked out once
    for all evaluations that are told the same is worked out for the distinct ones.
    """

    each: tuple[Condition, ...]  # M of them

    @cached_property
    def tokens(self) -> Tensor | None:
        """(M, L, D)."""
        return stacked([condition.tokens for condition in self.each])

    @cached_property
    def vector(self) -> Tensor | None:
        """(M, V)."""
        return stacked([condition.vector for condition in self.each])

    @cached_property
    def mask(self) -> Tensor | None:
        """(M, L)."""
        return stacked([condition.mask for condition in self.each])

    @cached_property
    def distinct(self) -> Distinct[Condition]:
        """Every condition once, and which of them each evaluation is told."""
        return Distinct.among(self.each)

    @cached_property
    def distinct_tokens(self) -> Distinct[Tensor]:
        """Every text's token states (L, D) once; candidates that differ in their vector share these."""
        tokens = [condition.tokens for condition in self.each if condition.tokens is not None]
        assert len(tokens) == len(self.each), "asked of a network that takes no tokens"
        return Distinct.among(tokens)


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Distinct(Generic[T]):
    """M things of which some are one and the same object: thing m is `unique[of[m]]`."""

    unique: tuple[T, ...]  # U of them, in the order of their first use
    of: tuple[int, ...]  # (M,), ascending for the conditions of a tick, which come grouped

    @classmethod
    def among(cls, things: Sequence[T]) -> Distinct[T]:
        """Tell things apart by identity."""
        known: dict[int, T] = {id(thing): thing for thing in things}
        place = {name: position for position, name in enumerate(known)}
        return cls(tuple(known.values()), tuple(place[id(thing)] for thing in things))


@dataclass(eq=False)
class Table:
    """The conditions of all rows in flight."""

    conditions: list[Condition] = field(default_factory=list)
    _last: tuple[tuple[int, ...], Conditions] | None = None

    def add(self, condition: Condition) -> int:
        """Keep a condition and return the index that rows carry."""
        self.conditions.append(condition)
        return len(self.conditions) - 1

    def gather(self, indices: Sequence[int]) -> Conditions:
        """The conditions at `indices`; the last answer is kept, since most ticks ask the same."""
        key = tuple(indices)
        if self._last is None or self._last[0] != key:
            self._last = (key, Conditions(tuple(self.conditions[index] for index in key)))
        return self._last[1]


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All tensors along a new first axis; None when there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors)), "a network takes a kind of condition always or never"
    return torch.stack(given) if given else None
