"""What the networks are told, apart from x and its noise level.

A `Condition` belongs to no row: it lives once in a `Table`, and rows carry its index, so the sixteen
candidates of a prompt share one null and one encoding of their text. Nothing here knows rows, samplers or
guidance; what conditions are made of, and which numbers mean "null", is a family's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """Conditions gathered for one network call, one per evaluation."""

    tokens: Tensor | None  # (M, L, D)
    vector: Tensor | None  # (M, V)
    mask: Tensor | None  # (M, L)


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
        """The conditions at `indices`, stacked; the last answer is kept, since most ticks ask the same."""
        key = tuple(indices)
        if self._last is None or self._last[0] != key:
            chosen = [self.conditions[index] for index in key]
            gathered = Conditions(
                stacked([condition.tokens for condition in chosen]),
                stacked([condition.vector for condition in chosen]),
                stacked([condition.mask for condition in chosen]),
            )
            self._last = (key, gathered)
        return self._last[1]


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All tensors along a new first axis; None when there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors)), "a network takes a kind of condition always or never"
    return torch.stack(given) if given else None
