"""A picture in the making, as it is admitted (`Row`) and in flight (`Live`).

What a row is, which conditions its coming step asks about, and where its noise comes from. It knows no other row, no
network and no device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from gen.conditioning import Condition
from samplers.guidance import Guide, cfg_terms
from samplers.noise import NoiseStream
from samplers.sample import SAMPLERS
from samplers.schedule import Schedule

MOST_CHURN = 2**0.5  # a step with s_churn begins at up to this times its level (Karras et al. 2022, Algorithm 2)

Likeness = Callable[[Tensor], Tensor]
"""likeness(clean estimates (B, ...)) -> (B,), the higher the better; differentiable"""


@dataclass(frozen=True, eq=False)
class KnownRegion:
    """What is held of a picture while the rest of it is painted."""

    clean: Tensor  # as the row's x
    is_painted: Tensor  # bool, as the row's x or with 1 for channels


@dataclass(frozen=True, eq=False)
class Row:
    """One picture in the making, as it is admitted; it is never changed."""

    key: Hashable  # the caller's name for it
    seed: int
    shape: tuple[int, ...]  # of its x
    schedule: Schedule
    sampler: str
    prompt: Condition  # the condition that counts
    last: Condition | None = None  # in its place on the last step; None: the same
    null: Condition | None = None  # the one guided away from; None only where guidance_scale is 1
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None  # guided where low < sigma <= high; None: everywhere
    guidance_rescale: float = 0.0
    guide: Guide = Guide()  # noqa: RUF009 - frozen
    thresholding: tuple[float, float] | None = None  # percentile and bound (see `thresholded`); None: off
    clip_guidance_scale: float = 0.0  # of the gradient of the estimate's likeness; 0: off
    likeness: Likeness | None = None  # to what it is to show; None only where clip_guidance_scale is 0
    options: Mapping[str, float] = field(default_factory=dict)  # the sampler's; its own where nothing is said
    start: Tensor | None = None  # unit noise in place of the seed's block 0
    drawn: int = 0  # blocks of noise drawn before its first step beyond that of its start; -1: its start draws none
    stream: str | None = None  # whose noise it draws (`samplers.noise.STAGES`); None: its stage's
    past: tuple[tuple[int, int], ...] = ()  # (seed, n): up to n steps taken noise is that seed's; then its own
    origin: Tensor | None = None  # what its start is added to; None: it begins with noise alone
    known_region: KnownRegion | None = None  # what is held of it while the rest is painted; None: all of it is painted


@dataclass(frozen=True, eq=False)
class Term:
    """A condition that a row is evaluated under on the coming step."""

    condition: Condition
    weight: float  # a row's weights sum to one
    alone: float  # the weight where guidance is off


@dataclass(eq=False)
class Live:
    """A row in flight: where it stands, and where its noise comes from."""

    row: Row
    streams: list[tuple[float, NoiseStream]]  # up to how many steps taken each is drawn from; the last is its own
    index: int  # its level, by its place in the schedule

    @classmethod
    def of(cls, row: Row, stage: str, index: int | None = None) -> Live:
        """At this level (None: its first); `stage` is whose noise it draws."""
        seeds = [*row.past, (row.seed, math.inf)]
        streams = [(end, NoiseStream([seed], row.stream or stage, row.shape)) for seed, end in seeds]
        return cls(row, streams, row.schedule.first if index is None else index)

    @property
    def taken(self) -> int:
        """Steps it has taken."""
        return self.index - self.row.schedule.first

    @property
    def start(self) -> Tensor:
        """The unit noise it begins with, on the CPU."""
        return self.streams[0][1].at(0)[0] if self.row.start is None else self.row.start.float().cpu()

    @property
    def first_sigma(self) -> float:
        """The level it begins at."""
        return self.row.schedule.sigmas[self.row.schedule.first].item()

    @property
    def stream(self) -> NoiseStream:
        """What the coming step draws from."""
        return next(stream for end, stream in self.streams if self.taken < end)

    @property
    def steps_left(self) -> int:
        """0 at the level that the row ends at."""
        return self.row.schedule.end - self.index

    def option(self, name: str) -> float:
        """The row's own, or else the sampler's."""
        return self.row.options.get(name, SAMPLERS[self.row.sampler].defaults[name])

    @cached_property
    def is_noisy(self) -> bool:
        """Whether its steps add fresh noise."""
        return any(self.option(name) > 0 for name in SAMPLERS[self.row.sampler].noise)

    @property
    def is_guided(self) -> bool:
        """Whether the coming step may ask at a level that is guided."""
        return self.row.guidance_scale != 1 and self._inside[self.index]

    @property
    def is_clip_guided(self) -> bool:
        """Whether the coming step may need the gradient of the likeness."""
        return self.row.clip_guidance_scale > 0 and self._inside[self.index]

    @cached_property
    def null(self) -> Condition | None:
        """What the row is guided away from: the null, or what a weaker network says of the prompt."""
        row = self.row
        return replace(row.prompt, network="weak") if row.null and row.guide.rule == "autoguidance" else row.null

    @property
    def prompt(self) -> Condition:
        """The condition that counts on the coming step."""
        return self.row.last if self.row.last is not None and self.steps_left == 1 else self.row.prompt

    @property
    def asking(self) -> tuple[bool, bool, bool]:
        """What is asked on the coming step, as far as it changes from step to step."""
        return self.is_guided, self.is_clip_guided, self.prompt is self.row.prompt

    @property
    def terms(self) -> list[Term]:
        """What to evaluate on the coming step."""
        if self.null is None or not self.is_guided:
            return [Term(self.prompt, 1.0, 1.0)]
        weights = cfg_terms(self.row.guidance_scale)
        return [Term(self.null, weights["null"], 0.0), Term(self.prompt, weights["prompt"], 1.0)]

    @cached_property
    def _inside(self) -> list[bool]:
        """Of each step whether it may ask within the interval."""
        row = self.row
        if row.guidance_interval is None:
            return [True] * row.schedule.last
        low, high = row.guidance_interval
        churn = MOST_CHURN if row.options.get("s_churn") else 1.0
        steps = list(pairwise(row.schedule.sigmas.tolist()))
        inside = [low < now * churn and now <= high for now, _ in steps]
        sampler = SAMPLERS[row.sampler]
        if sampler.again is not None:
            options = {name: self.option(name) for name in sampler.defaults}
            seconds = [sampler.again(now, next, options) for now, next in steps]
            inside = [first or low < second <= high for first, second in zip(inside, seconds, strict=True)]
        return inside
