"""Rows that share a state (`Lane`), what their coming step asks (`Plan`), and lanes that ask together (`Pass`).

All that a tick needs of a lane's rows lies on the device in the order of its rows, and changes only when they do. It
asks no network and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from clip_core.device import to_device
from gen.bucket import Bucket, next_cut
from gen.conditioning import Condition, Conditions
from gen.row import Likeness, Live, Row
from samplers.guidance import Guides, spread
from samplers.inpaint import KnownRegions
from samplers.sample import SAMPLERS
from samplers.scaling import Preconditioning, Scaling
from samplers.state import Level, State

EVERYWHERE = (-math.inf, math.inf)  # a guidance interval
MOMENTUM = "momentum"  # what a state remembers of rows that follow apg


@dataclass(frozen=True, eq=False)
class LevelView:
    """A level of each row, and how the network is asked there."""

    level: Level
    preconditioning: Preconditioning


@dataclass(frozen=True, eq=False)
class LevelTable:
    """Where each row stands in its own schedule and will stand, on the device, so that no tick has to work it out.

    Entries behind a row's last level are padding.
    """

    levels: Tensor  # (T, 5, B) float32, the level of each row so many steps on, and how the network is asked there
    places: Tensor  # (T, 2, B) int64, of each level its index and how many are left
    at: int = 0  # steps taken since these tables were made

    @classmethod
    def of(cls, live: Sequence[Live], scaling: Scaling, device: torch.device) -> LevelTable:
        """As the rows stand; the scaling's table lies on the device."""
        coming = [one.row.schedule.sigmas[one.index :].float() for one in live]
        sigmas = to_device(pad_sequence(coming), device)  # (T, B)
        index = torch.arange(len(sigmas))[:, None] + torch.tensor([one.index for one in live])
        left = torch.tensor([one.row.schedule.last for one in live]) - index
        levels = torch.stack([sigmas, *scaling.preconditioning(sigmas).values], 1)
        return cls(levels, to_device(torch.stack([index, left], 1), device))

    @cached_property
    def step(self) -> tuple[LevelView, LevelView]:
        """From where to where the coming step goes, always by the same tensors."""
        now, then = (
            LevelView(Level(levels[0], *places), Preconditioning(levels[1:]))
            for levels, places in ((self.levels[at], self.places[at]) for at in (self.at, self.at + 1))
        )
        return now, then

    def on(self) -> LevelTable:
        """One step further."""
        return replace(self, at=self.at + 1)

    def select(self, rows: Tensor | slice) -> LevelTable:
        """The rows (K,) that go on; a slice of them is a view."""
        return LevelTable(self.levels[self.at :, :, rows], self.places[self.at :, :, rows])

    def cat(self, other: LevelTable) -> LevelTable:
        """These rows, then the other's."""
        longest = max(len(table.levels) - table.at for table in (self, other))

        def together(*tables: Tensor) -> Tensor:
            return torch.cat([F.pad(each, (0, 0, 0, 0, 0, longest - len(each))) for each in tables], 2)

        levels = together(self.levels[self.at :], other.levels[other.at :])
        return LevelTable(levels, together(self.places[self.at :], other.places[other.at :]))


@dataclass(eq=False)
class Lane:
    """Rows that share a state: one sampler, one shape."""

    sampler: str
    rows: list[Live]
    state: State
    table: LevelTable
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
    num_terms: list[int]  # evaluations of each row
    conditions: list[Condition]  # (M,) of each evaluation, `text_by_text`
    slots: list[int]  # (M,) the row of each evaluation
    rows: Tensor  # (M,) int64, `slots` on the device, as all that follows
    spread: Tensor  # (M, values of x) int64, the same for every value
    weights: Tensor  # (M,)
    alone: Tensor  # (M,) the weights where guidance is off
    away: Tensor  # (B,) bool, the rows that have a null on the coming step
    interval: tuple[Tensor, Tensor] | None  # (B,) each; None where all rows are guided everywhere
    rescale: Tensor | None  # (B,); None where no row asks for it
    guides: Guides | None  # None where all rows follow cfg
    thresholding: tuple[Tensor, Tensor] | None  # percentile and bound, (B,) each; None where no row asks for it
    clip_guided: list[tuple[int, float, Likeness]]  # slot, clip_guidance_scale and likeness of rows that climb
    known_regions: KnownRegions | None  # None where all of every row is painted
    options: dict[str, Tensor]  # (B,) each; what all rows leave to the sampler is not among them

    @classmethod
    def of(cls, lane: Lane, device: torch.device) -> Plan:
        """For the rows as they stand."""

        def pairs(values: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
            first, second = to_device(torch.tensor(values), device).unbind(1)
            return first, second

        terms = [one.terms for one in lane.rows]
        by_row = [(term, slot) for slot, each in enumerate(terms) for term in each]
        listed = [by_row[place] for place in text_by_text([term.condition for term, _ in by_row])]
        rows = [one.row for one in lane.rows]
        slots = [slot for _, slot in listed]
        each_row = to_device(torch.tensor(slots), device)
        intervals = [row.guidance_interval or EVERYWHERE for row in rows]
        rescaled = [row.guidance_rescale for row in rows]
        guides = Guides.of([(row.guide, row.guidance_scale) for row in rows], partial(to_device, device=device))
        return cls(
            asking=[one.asking for one in lane.rows],
            num_terms=[len(each) for each in terms],
            conditions=[term.condition for term, _ in listed],
            slots=slots,
            rows=each_row,
            spread=spread(each_row, math.prod(rows[0].shape)),
            weights=to_device(torch.tensor([term.weight for term, _ in listed]), device),
            alone=to_device(torch.tensor([term.alone for term, _ in listed]), device),
            away=to_device(torch.tensor([len(each) > 1 for each in terms]), device),
            interval=None if set(intervals) == {EVERYWHERE} else pairs(intervals),
            rescale=to_device(torch.tensor(rescaled), device) if any(rescaled) else None,
            guides=guides,
            thresholding=pairs([row.thresholding or (0.0, 1.0) for row in rows])
            if any(row.thresholding for row in rows)
            else None,
            clip_guided=[
                (slot, one.row.clip_guidance_scale, one.row.likeness)
                for slot, one in enumerate(lane.rows)
                if one.is_clip_guided and one.row.likeness is not None
            ],
            known_regions=known_regions_of(lane, device),
            options=options_of(lane, device),
        )


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """A chunk of a pass that the network is asked at once."""

    start: int
    stop: int
    conditions: Conditions


@dataclass(eq=False)
class Pass:
    """The evaluations of lanes that ask the network at one time, in the order it is asked; it holds as their plans do.

    Lanes stand one behind the other: the second lane's first row is the row behind the first lane's last.
    """

    plans: list[Plan]
    conditions: list[Condition]  # (M,) of each evaluation, `text_by_text`
    owners: list[tuple[int, int]]  # (M,) whose each evaluation is: which lane's, and its slot there
    ends: list[int]  # where the groups of one condition end
    rows: Tensor  # (M,) int64, the row of each evaluation, on the device
    places: list[Tensor] | None  # of each lane where those of its plan are, on the device; None of one: as they stand
    calls: list[NetworkCall] = field(default_factory=list)  # as it was asked last

    @classmethod
    def of(cls, lanes: Sequence[Lane], plans: Sequence[Plan], device: torch.device) -> Pass:
        """For lanes whose rows share network calls, with their plans."""
        listed = [
            (condition, number, slot)
            for number, plan in enumerate(plans)
            for condition, slot in zip(plan.conditions, plan.slots, strict=True)
        ]
        if len(plans) == 1:
            order = list(range(len(listed)))  # as its plan has it
        else:
            order = text_by_text([condition for condition, _, _ in listed])
        conditions = [listed[k][0] for k in order]
        owners = [listed[k][1:] for k in order]
        first_rows = list(accumulate((len(lane.rows) for lane in lanes), initial=0))
        places = sorted(range(len(order)), key=order.__getitem__)
        first_places = list(accumulate((len(plan.slots) for plan in plans), initial=0))
        return cls(
            plans=list(plans),
            conditions=conditions,
            owners=owners,
            ends=list(accumulate(len(list(group)) for _, group in groupby(conditions, key=id))),
            rows=to_device(torch.tensor([first_rows[number] + slot for number, slot in owners]), device),
            places=None
            if len(plans) == 1
            else [to_device(torch.tensor(places[start:stop]), device) for start, stop in pairwise(first_places)],
        )

    def call(self, place: int, start: int, size: int) -> NetworkCall:
        """Call number `place`, of `size` evaluations at most; that of the last time where it is the same."""
        stop = next_cut(self.ends, start, size)
        if place < len(self.calls):
            former = self.calls[place]
            if (former.start, former.stop) == (start, stop):
                return former
        conditions = Conditions(tuple(self.conditions[start:stop]), tuple(self.owners[start:stop]))
        self.calls[place:] = [NetworkCall(start, stop, conditions)]
        return self.calls[place]


def text_by_text(conditions: Sequence[Condition]) -> list[int]:
    """The order that evaluations are asked in, by their places: text by text, and by condition within a text.

    Texts and conditions come in the order of their first use; what is in this order stays as it is.
    """
    texts: dict[int, int] = {}
    known: dict[int, int] = {}
    for condition in conditions:
        texts.setdefault(id(condition.encoder_hidden_states), len(texts))
        known.setdefault(id(condition), len(known))
    keys = [(texts[id(condition.encoder_hidden_states)], known[id(condition)]) for condition in conditions]
    return sorted(range(len(keys)), key=keys.__getitem__)


def lane_of(row: Row) -> Hashable:
    """What rows have in common that share a lane."""
    return row.sampler, batch_of(row)


def batch_of(row: Row) -> Hashable:
    """What rows have in common whose evaluations share network calls."""
    tokens = row.prompt.encoder_hidden_states
    return row.shape, None if tokens is None else tokens.shape


def alike(state: State, other: State) -> State:
    """A state that remembers what the other does of its rows' guidance, from its beginning: zeros."""
    if MOMENTUM not in other.memory or MOMENTUM in state.memory:
        return state
    return state.remember(**{MOMENTUM: torch.zeros_like(state.x)})


def known_regions_of(lane: Lane, device: torch.device) -> KnownRegions | None:
    """What is known of the rows; of one that is painted whole, nothing."""
    if not any(one.row.known_region for one in lane.rows):
        return None
    nothing = torch.zeros(lane.rows[0].row.shape, device=device)
    everywhere = torch.ones(lane.rows[0].row.shape, dtype=torch.bool, device=device)
    regions = [one.row.known_region for one in lane.rows]
    return KnownRegions(
        clean=torch.stack([nothing if each is None else each.clean.to(device) for each in regions]),
        noise=to_device(torch.stack([one.start for one in lane.rows]), device),
        is_painted=torch.stack(
            [everywhere if each is None else each.is_painted.to(device).expand_as(nothing) for each in regions]
        ),
        below=to_device(torch.tensor([one.first_sigma for one in lane.rows]), device),
    )


def options_of(lane: Lane, device: torch.device) -> dict[str, Tensor]:
    """The sampler's options, (B,) each; one that every row leaves as the sampler has it is left out."""
    options = {}
    for name, default in SAMPLERS[lane.sampler].defaults.items():
        values = [one.option(name) for one in lane.rows]
        if any(value != default for value in values):
            options[name] = to_device(torch.tensor(values), device)
    return options
