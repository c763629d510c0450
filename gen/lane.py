"""Rows that share a state (`Lane`), what their coming step asks (`Plan`), and lanes that ask together (`Pass`).

All that a tick needs of a lane's rows lies on the device in the order of its rows, and changes only when they do. It
asks no network and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_core.device import sent
from gen.bucket import Bucket, next_cut
from gen.conditioning import Condition, Conditions
from gen.row import Likeness, Live, Row
from samplers.guidance import Guides
from samplers.inpaint import Held
from samplers.sample import SAMPLERS
from samplers.state import Level, State

MOMENTUM = "momentum"  # what a state remembers of rows that follow apg


@dataclass(frozen=True, eq=False)
class Walk:
    """Where each row stands in its own schedule, on the device, so that no tick has to send it there."""

    sigmas: Tensor  # (B, N + 1) float32, each row's levels; zeros behind its last
    last: Tensor  # (B,) int64, the index of each row's last level
    index: Tensor  # (B,) int64

    @classmethod
    def of(cls, live: Sequence[Live], device: torch.device) -> Walk:
        """As the rows stand."""
        longest = max(one.row.schedule.last for one in live)
        levels = [one.row.schedule.sigmas.float() for one in live]
        sigmas = torch.stack([F.pad(each, (0, longest + 1 - len(each))) for each in levels])
        last = torch.tensor([one.row.schedule.last for one in live])
        index = torch.tensor([one.index for one in live])
        return cls(sent(sigmas, device), sent(last, device), sent(index, device))

    def level(self, ahead: int) -> Level:
        """The level so many steps on."""
        index = self.index + ahead
        return Level(self.sigmas.gather(1, index[:, None])[:, 0], index, self.last - index)

    def on(self) -> Walk:
        """One step further."""
        return Walk(self.sigmas, self.last, self.index + 1)

    def select(self, rows: Tensor | slice) -> Walk:
        """The rows (K,) that go on; a slice of them is a view."""
        return Walk(self.sigmas[rows], self.last[rows], self.index[rows])

    def cat(self, other: Walk) -> Walk:
        """These rows, then the other's."""
        longest = max(self.sigmas.shape[1], other.sigmas.shape[1])
        sigmas = [F.pad(each, (0, longest - each.shape[1])) for each in (self.sigmas, other.sigmas)]
        return Walk(
            torch.cat(sigmas),
            torch.cat([self.last, other.last]),
            torch.cat([self.index, other.index]),
        )


@dataclass(eq=False)
class Lane:
    """Rows that share a state: one sampler, one shape."""

    sampler: str
    rows: list[Live]
    state: State
    walk: Walk
    bucket: Bucket
    plan: Plan | None = None  # of the coming step; None where the rows have changed
    apart: object = None  # lanes that have one take their steps with those of the same; memory ran out over more
    apart_for: int = 0  # steps, and then with all others again

    @property
    def num_evaluations(self) -> int:
        """Of the network, each time that it is asked on the coming step."""
        return sum(len(one.terms) for one in self.rows)


@dataclass(eq=False)
class Plan:
    """What a lane's rows are asked under on the coming step, and how the answers are weighed.

    It holds until the rows change, or what some of them ask.
    """

    asking: list[tuple[bool, bool, bool]]  # of each row
    conditions: list[Condition]  # (M,) of each evaluation, row by row
    slots: list[int]  # (M,) the row of each evaluation
    rows: Tensor  # (M,) int64, `slots` on the device, as all that follows
    weights: Tensor  # (M,)
    alone: Tensor  # (M,) the weights where guidance is off
    away: Tensor  # (B,) bool, the rows that have a null on the coming step
    interval: tuple[Tensor, Tensor]  # (B,) each
    rescale: Tensor | None  # (B,); None where no row asks for it
    guides: Guides | None  # None where all rows follow cfg
    thresholding: tuple[Tensor, Tensor] | None  # percentile and bound, (B,) each; None where no row asks for it
    steered: list[tuple[int, float, Likeness]]  # slot, clip_guidance_scale and likeness of rows that climb
    held: Held | None  # None where all of every row is painted
    options: dict[str, Tensor]  # (B,) each; what all rows leave to the sampler is not among them

    @classmethod
    def of(cls, lane: Lane, device: torch.device) -> Plan:
        """For the rows as they stand."""
        listed = [(term, slot) for slot, one in enumerate(lane.rows) for term in one.terms]
        rows = [one.row for one in lane.rows]
        slots = [slot for _, slot in listed]
        intervals = [row.guidance_interval or (-math.inf, math.inf) for row in rows]
        low, high = sent(torch.tensor(intervals), device).unbind(1)
        rescaled = [row.guidance_rescale for row in rows]
        guides = Guides.of([(row.guide, row.guidance_scale) for row in rows], partial(sent, device=device))
        percentile, bound = sent(torch.tensor([row.thresholding or (0.0, 1.0) for row in rows]), device).unbind(1)
        return cls(
            asking=[one.asking for one in lane.rows],
            conditions=[term.condition for term, _ in listed],
            slots=slots,
            rows=sent(torch.tensor(slots), device),
            weights=sent(torch.tensor([term.weight for term, _ in listed]), device),
            alone=sent(torch.tensor([term.alone for term, _ in listed]), device),
            away=sent(torch.tensor([len(one.terms) > 1 for one in lane.rows]), device),
            interval=(low, high),
            rescale=sent(torch.tensor(rescaled), device) if any(rescaled) else None,
            guides=guides,
            thresholding=(percentile, bound) if any(row.thresholding for row in rows) else None,
            steered=[
                (slot, one.row.clip_guidance_scale, one.row.likeness)
                for slot, one in enumerate(lane.rows)
                if one.is_steered and one.row.likeness is not None
            ],
            held=held_of(lane, device),
            options=options_of(lane, device),
        )


@dataclass(frozen=True, eq=False)
class Call:
    """A chunk of a pass that the network is asked at once."""

    start: int
    stop: int
    told: Conditions


@dataclass(eq=False)
class Pass:
    """The evaluations of lanes that ask the network at one time, in the order it is asked; it holds as their plans do.

    Lanes stand one behind the other: the second lane's first row is the row behind the first lane's last.
    """

    plans: list[Plan]
    conditions: list[Condition]  # (M,) of each evaluation: text by text, and condition by condition within a text
    owners: list[tuple[int, int]]  # (M,) whose each evaluation is: which lane's, and its slot there
    ends: list[int]  # where the groups of one condition end
    rows: Tensor  # (M,) int64, the row of each evaluation, on the device
    places: list[Tensor]  # of each lane where its evaluations are, in the order of its plan, on the device
    calls: list[Call] = field(default_factory=list)  # as it was asked last

    @classmethod
    def of(cls, lanes: Sequence[Lane], plans: Sequence[Plan], device: torch.device) -> Pass:
        """For lanes whose rows share network calls, with their plans."""
        listed = [
            (condition, number, slot)
            for number, plan in enumerate(plans)
            for condition, slot in zip(plan.conditions, plan.slots, strict=True)
        ]
        texts: dict[int, int] = {}
        conditions: dict[int, int] = {}
        for condition, _, _ in listed:  # in the order of their first use
            texts.setdefault(id(condition.tokens), len(texts))
            conditions.setdefault(id(condition), len(conditions))
        keys = [(texts[id(condition.tokens)], conditions[id(condition)]) for condition, _, _ in listed]
        order = sorted(range(len(listed)), key=keys.__getitem__)
        told = [listed[k][0] for k in order]
        owners = [listed[k][1:] for k in order]
        first_rows = list(accumulate((len(lane.rows) for lane in lanes), initial=0))
        places = sorted(range(len(order)), key=order.__getitem__)
        first_places = list(accumulate((len(plan.slots) for plan in plans), initial=0))
        return cls(
            plans=list(plans),
            conditions=told,
            owners=owners,
            ends=list(accumulate(len(list(group)) for _, group in groupby(told, key=id))),
            rows=sent(torch.tensor([first_rows[number] + slot for number, slot in owners]), device),
            places=[sent(torch.tensor(places[start:stop]), device) for start, stop in pairwise(first_places)],
        )

    def call(self, place: int, start: int, size: int) -> Call:
        """Call number `place`, of `size` evaluations at most; that of the last time where it is the same."""
        stop = next_cut(self.ends, start, size)
        if place < len(self.calls):
            former = self.calls[place]
            if (former.start, former.stop) == (start, stop):
                return former
        told = Conditions(tuple(self.conditions[start:stop]), tuple(self.owners[start:stop]))
        self.calls[place:] = [Call(start, stop, told)]
        return self.calls[place]


def lane_of(row: Row) -> Hashable:
    """What rows have in common that share a lane."""
    return row.sampler, batch_of(row)


def batch_of(row: Row) -> Hashable:
    """What rows have in common whose evaluations share network calls."""
    tokens = row.prompt.tokens
    return row.shape, None if tokens is None else tokens.shape


def alike(state: State, other: State) -> State:
    """A state that remembers what the other does of its rows' guidance, from its beginning: zeros."""
    if MOMENTUM not in other.memory or MOMENTUM in state.memory:
        return state
    return state.remember(**{MOMENTUM: torch.zeros_like(state.x)})


def held_of(lane: Lane, device: torch.device) -> Held | None:
    """What is held of the rows; of one that is painted whole, nothing."""
    if not any(one.row.hold for one in lane.rows):
        return None
    nothing = torch.zeros(lane.rows[0].row.shape, device=device)
    everywhere = torch.ones(lane.rows[0].row.shape, dtype=torch.bool, device=device)
    holds = [one.row.hold for one in lane.rows]
    return Held(
        known=torch.stack([nothing if hold is None else hold.known.to(device) for hold in holds]),
        noise=sent(torch.stack([one.start for one in lane.rows]), device),
        is_painted=torch.stack(
            [everywhere if hold is None else hold.is_painted.to(device).expand_as(nothing) for hold in holds]
        ),
        below=sent(torch.tensor([one.first_sigma for one in lane.rows]), device),
    )


def options_of(lane: Lane, device: torch.device) -> dict[str, Tensor]:
    """The sampler's options, (B,) each; one that every row leaves as the sampler has it is left out."""
    told = {}
    for name, default in SAMPLERS[lane.sampler].defaults.items():
        values = [one.option(name) for one in lane.rows]
        if any(value != default for value in values):
            told[name] = sent(torch.tensor(values), device)
    return told
