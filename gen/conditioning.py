"""What the networks are told, apart from x and its noise level.

A `Condition` belongs to no row: rows refer to it, so the sixteen candidates of a prompt share one null and one
encoding of their text, and it is gone when its last row is. Conditions are told apart by identity; a `Table` gives
the same one to all who say the same. Nothing here knows rows, samplers or guidance; what conditions are made of, and
which numbers mean "null", is a family's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from clip_core.device import to_device

NetworkName = Literal["own", "weak", "draft", "last"]
"""Which of a model's networks: its own, the weaker one of autoguidance, that of drafts, or of a row's last step"""


@dataclass(frozen=True, eq=False)
class Condition:
    """One thing a network can be told; what is None, this network does not take.

    `pooled_projections` is one vector beside the token states, under the name that each network has for it: the class
    labels of Stable unCLIP and Karlo, `text_embeds` and `image_embeds` of SDXL and Kandinsky, the prior's
    `proj_embedding`.
    """

    encoder_hidden_states: Tensor | None = None  # (L, D), cross-attended
    pooled_projections: Tensor | None = None  # (V,), of the whole text, image or both
    attention_mask: Tensor | None = None  # (L,) bool, True where there is text
    time_ids: Tensor | None = None  # (S,), SDXL's: sizes of the picture in pixels, and its aesthetic score
    concat_channels: Tensor | None = None  # (C', h, w), what the network sees behind the channels of x
    ip_hidden_states: Tensor | None = None  # (T, D), cross-attended beside the text (IP-Adapter); None: no picture
    network: NetworkName = "own"

    def copy(self) -> Condition:
        """The same told by another object, so that what is kept beside the one is not found beside the other."""
        states = self.encoder_hidden_states
        return replace(self, encoder_hidden_states=None if states is None else states[:])


ConditionPair = tuple[Condition, Condition | None]
"""Prompt and null of a candidate; the null is None where it is not guided"""


@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditions gathered for one network call of M evaluations.

    A network that takes a tensor per evaluation reads those of `Condition`'s names; what can be worked out once for all
    evaluations that are told the same is worked out for the distinct ones.
    """

    each: tuple[Condition, ...]  # M of them
    rows: tuple[Hashable, ...] | None = None  # (M,) whose x each evaluation sees; None: nobody says

    @cached_property
    def encoder_hidden_states(self) -> Tensor | None:
        """(M, L, D)."""
        return stacked([condition.encoder_hidden_states for condition in self.each])

    @cached_property
    def pooled_projections(self) -> Tensor | None:
        """(M, V)."""
        return stacked([condition.pooled_projections for condition in self.each])

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """(M, L)."""
        return stacked([condition.attention_mask for condition in self.each])

    @cached_property
    def time_ids(self) -> Tensor | None:
        """(M, S)."""
        return stacked([condition.time_ids for condition in self.each])

    @cached_property
    def concat_channels(self) -> Tensor | None:
        """(M, C', h, w)."""
        return stacked([condition.concat_channels for condition in self.each])

    @cached_property
    def places(self) -> dict[NetworkName, list[int]]:
        """Which of the evaluations ask each network."""
        places: dict[NetworkName, list[int]] = {}
        for place, condition in enumerate(self.each):
            places.setdefault(condition.network, []).append(place)
        return places

    @cached_property
    def parts(self) -> dict[NetworkName, Conditions]:
        """Those that ask each network by themselves; what a network keeps of a call is found beside them again."""
        return {name: self.some(here) for name, here in self.places.items()}

    def some(self, places: Iterable[int]) -> Conditions:
        """Those of some evaluations."""
        here = list(places)
        rows = None if self.rows is None else tuple(self.rows[place] for place in here)
        return Conditions(tuple(self.each[place] for place in here), rows)

    def beside(self, x: Tensor) -> Tensor:
        """What the network sees: x (M, C, h, w), and behind it what it is told beside it."""
        return x if self.concat_channels is None else torch.cat([x, self.concat_channels], dim=1)

    @cached_property
    def distinct(self) -> Distinct[Condition]:
        """Every condition once, and which of them each evaluation is told."""
        return Distinct.among(self.each)

    @cached_property
    def distinct_encoder_hidden_states(self) -> Distinct[Tensor]:
        """Every text's token states (L, D) once; candidates that differ in their pooled projections share these."""
        states = [
            condition.encoder_hidden_states for condition in self.each if condition.encoder_hidden_states is not None
        ]
        assert len(states) == len(self.each), "asked of a network that takes no tokens"
        return Distinct.among(states)

    @cached_property
    def alike(self) -> Alike | None:
        """Which evaluations are one until their texts are read, as prompt and null of a row; None: no two are."""
        if self.rows is None or self.encoder_hidden_states is None:
            return None
        kinds: dict[Hashable, int] = {}
        first, of = list[int](), list[int]()
        for place, (row, one) in enumerate(zip(self.rows, self.each, strict=True)):
            kind = (row, *map(id, (one.pooled_projections, one.attention_mask, one.time_ids, one.concat_channels)))
            if kind not in kinds:
                kinds[kind] = len(kinds)
                first.append(place)
            of.append(kinds[kind])
        if len(first) == len(of):
            return None
        return Alike(*(to_device(torch.tensor(each), self.encoder_hidden_states.device) for each in (first, of)))

    def distinct_ip_hidden_states(self, blank: Tensor) -> Distinct[Tensor]:
        """Every picture's tokens (T, D) once; those of no picture are `blank`."""
        return Distinct.among([blank if each.ip_hidden_states is None else each.ip_hidden_states for each in self.each])


@dataclass(frozen=True, eq=False)
class Alike:
    """M evaluations that are U different ones until their texts are read."""

    first: Tensor  # (U,) int64, the first evaluation of each kind
    of: Tensor  # (M,) int64, the kind of each

    def once(self, states: Tensor) -> Tensor:
        """Of what is there for each evaluation (M, ...) that of each kind (U, ...)."""
        return states.index_select(0, self.first)

    def each(self, states: Tensor) -> Tensor:
        """What there is for each kind (U, ...), for each evaluation (M, ...)."""
        return states.index_select(0, self.of)


T = TypeVar("T")
M = TypeVar("M")
N = TypeVar("N", bound=Hashable)
MOST_TEXTS = 32  # that a text tower reads at once: as fast as many more, and what it holds meanwhile stays small


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


def each_read(
    texts: Sequence[str], empty: Callable[[], Condition], read: Callable[[list[str]], Sequence[Condition]]
) -> list[Condition]:
    """A condition of its own for each text, each text read once; the empty one, which most ask for, was read before."""
    known = {"": empty()} if "" in texts else {}
    unknown = [text for text in dict.fromkeys(texts) if text not in known]
    known |= zip(unknown, in_turns(unknown, read), strict=True)
    return [known[text].copy() for text in texts]


def in_turns(texts: Sequence[T], read: Callable[[list[T]], Iterable[M]]) -> list[M]:
    """What is read of each text, a bounded number of them at once."""
    return [one for first in range(0, len(texts), MOST_TEXTS) for one in read(list(texts[first : first + MOST_TEXTS]))]


class Table:
    """The conditions in flight by what they say, so that requests that say the same are told one and the same.

    It holds them weakly. Whoever reads a condition refers to it, and the last reader takes it along, with all that
    is kept beside it (keys and values, a prior's prefix).
    """

    def __init__(self) -> None:
        self._known: WeakValueDictionary[Hashable, Condition] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, names: Sequence[N], make: Callable[[list[N]], Sequence[Condition]]) -> dict[N, Condition]:
        """The conditions of these names; `make` is asked, once, for those that nobody is told yet."""
        found = {name: self._known.get(name) for name in names}
        missing = [name for name, condition in found.items() if condition is None]
        made = dict(zip(missing, make(missing), strict=True)) if missing else {}
        for name, condition in made.items():
            self._known[name] = condition
        return {name: condition for name, condition in (found | made).items() if condition is not None}


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All tensors along a new first axis; None when there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors)), "a network takes a kind of condition always or never"
    return torch.stack(given) if given else None
