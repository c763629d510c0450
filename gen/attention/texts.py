"""Which text each evaluation of a network's call reads, and the keys and values of it.

They are computed once per text and layer, outside the network's call, kept for as long as what they are of lives, and
read by all its candidates without a copy for each. How they are computed is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gen.conditioning import Distinct

T = TypeVar("T")


class Reading(Protocol):
    """What the processors ask of the texts of a network's call of M evaluations."""

    @property
    def block(self) -> int:
        """How many evaluations in a row read one text, at least."""

    def of_layer(self, place: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values (M / block, heads, L, d) of a layer, for the own block or for 1."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Which text each of M evaluations reads, in blocks of equally many evaluations that read the same one.

    The block is the greatest common divisor of how many evaluations in a row read one text: all the candidates
    where every text has equally many, and one evaluation at worst. A block's queries are attended to as those of
    one long picture, which reads the keys and values of its text where they are.
    """

    block: int
    of_block: tuple[int, ...]  # (M / block,) the text each block reads
    pairs: tuple[tuple[Tensor, ...], ...]  # of each text, of each layer that reads it: keys and values (2, heads, L, d)

    @classmethod
    def read(cls, of: Sequence[int], pairs: Sequence[tuple[Tensor, ...]]) -> Texts:
        """Evaluation m reads text of[m], whose keys and values are pairs[of[m]]."""
        block = math.gcd(*(len(list(run)) for _, run in groupby(of)))
        return cls(block, tuple(of[::block]), tuple(pairs))

    def of_layer(self, place: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values (M / block, heads, L, d), for the own block or for 1."""
        each = [self.pairs[text][place] for text in self.of_block for _ in range(self.block // block)]
        key, value = torch.stack(each, 1)
        return key, value

    @property
    def of(self) -> list[int]:
        """(M,) the text each evaluation reads."""
        return [text for text in self.of_block for _ in range(self.block)]

    def of_rows(self, at: slice) -> Tensor:
        """What some evaluations read, of all layers one behind the other (B, sum of 2 * heads * L * d)."""
        read = [self.flat[text] for text in self.of[at]]
        return read[0][None] if len(read) == 1 else torch.stack(read)

    @cached_property
    def flat(self) -> list[Tensor]:
        """Of each text what all layers read, one behind the other."""
        return [torch.cat([pair.flatten() for pair in pairs]) for pairs in self.pairs]


@dataclass(frozen=True, eq=False)
class Handed:
    """Texts of a call as tensors: what reads them is traced and then asked about others."""

    pairs: Sequence[Tensor]  # of each layer that reads a text: keys and values (B, 2, heads, L, d), B dividing M
    block: int = 0  # M / B, which is not known

    @classmethod
    def of(cls, rows: Tensor, shapes: Sequence[Sequence[int]]) -> Handed:
        """As `Texts.of_rows` tells them, the shapes being those of each layer's (2, heads, L, d)."""
        parts = rows.split([math.prod(shape) for shape in shapes], 1)
        return cls([part.unflatten(1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)])

    def of_layer(self, place: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, d); there is one entry for each block already, whichever block is asked for."""
        key, value = self.pairs[place].unbind(1)
        return key, value


@dataclass(eq=False)
class TextCache:
    """What the processors of one network keep of texts: told apart by identity, gone with them."""

    pairs: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # Texts.pairs of a text
    calls: WeakKeyDictionary[Distinct[Any], Texts] = field(default_factory=WeakKeyDictionary)

    def read(self, texts: Distinct[T], project: Callable[[list[T]], list[tuple[Tensor, ...]]]) -> Texts:
        """Which text each evaluation reads; `project` is asked for the pairs of those that are new."""
        if texts not in self.calls:
            new = [text for text in texts.unique if text not in self.pairs]
            for text, pairs in zip(new, project(new) if new else [], strict=True):
                self.pairs[text] = pairs
            self.calls[texts] = Texts.read(texts.of, [self.pairs[text] for text in texts.unique])
        return self.calls[texts]
