"""A lane's step being worked out: what it asks, how far it has come, and whose it is when something goes wrong.

A step is played until it asks the network, and again from its beginning with what was said. It asks no network itself,
and knows neither how answers are weighed nor what becomes of rows that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gen.lane import MOMENTUM, Lane, LevelTable, Plan
from samplers.inpaint import inpainting
from samplers.sample import advance
from samplers.scaling import Preconditioning
from samplers.state import Prediction, State

Member = tuple[Lane, int]
"""A lane and a slot of it"""


class StepFailed(Exception):
    """What rows needed for their step raised; `__cause__` says what."""

    def __init__(self, members: Sequence[Member], *, in_call: bool) -> None:
        super().__init__()
        self.members = members  # a row as often as it has evaluations in a call that failed
        self.in_call = in_call  # whether one call of the network failed, which may be asked in smaller ones


class Question(Exception):
    """A step has come to where it asks the network what it has not been told yet."""

    def __init__(self, x: Tensor, sigma: Tensor, preconditioning: Preconditioning | None) -> None:
        super().__init__()
        self.x, self.sigma = x, sigma  # (B, ...) and (B,)
        self.preconditioning = preconditioning  # of the network there; None: to be worked out, to the same bits


@dataclass(frozen=True, eq=False)
class End:
    """Where a lane's step has come to."""

    state: State
    table: LevelTable
    x0: Tensor  # (B, ...) the latest estimates


@dataclass(eq=False)
class Attempt:
    """A lane's step being worked out; nothing of it is taken before all of it is there."""

    lane: Lane
    plan: Plan
    noise: Tensor | None  # (B, ...); None where no row of the lane takes any
    momentum: Tensor | None  # (B, ...), the running differences of rows that follow apg; None: no row has one
    predictions: list[Prediction] = field(default_factory=list)  # what its denoiser has said so far
    end: End | None = None  # None: not worked out yet

    def play(self) -> Question | None:
        """Work the step out as far as it has been told; what it asks next, or None where it is done.

        It begins anew each time, which is nothing to a pure function, so that lanes of several samplers, some of which
        ask twice, can share network calls.
        """
        predictions, lane, ends = iter(self.predictions), self.lane, self.lane.table.step

        def denoise(x: Tensor, sigma: Tensor) -> Prediction:
            prediction = next(predictions, None)
            if prediction is None:
                known = (end.preconditioning for end in ends if end.level.sigma is sigma)  # handed on as it is
                raise Question(x, sigma, next(known, None))
            return prediction

        now, then = (end.level for end in ends)
        asking = denoise if self.plan.known_regions is None else inpainting(denoise, self.plan.known_regions)
        try:
            state = advance(lane.sampler, asking, lane.state, now, then, self.noise, self.plan.options)
        except Question as asked:
            return asked.with_traceback(None)  # its frames hold all that asks, and would be held by it
        if self.momentum is not None:
            state = state.remember(**{MOMENTUM: self.momentum})
        x0, regions = self.predictions[-1].x0, self.plan.known_regions
        x0 = x0 if regions is None else torch.where(regions.is_painted, x0, regions.clean)
        self.end = End(state, lane.table.on(), x0)
        return None


@dataclass(frozen=True, eq=False)
class Blame:
    """What goes wrong within is these rows', unless somebody further within knows better."""

    members: Callable[[], Sequence[Member]]
    in_call: bool = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StepFailed):
            raise StepFailed(self.members(), in_call=self.in_call) from error


def blaming(*lanes: Lane) -> Blame:
    """What goes wrong within is these lanes'."""
    return Blame(partial(members_of, lanes))


def blaming_row(lane: Lane, slot: int) -> Blame:
    """What goes wrong within is this row's alone."""
    return Blame(lambda: [(lane, slot)])


def members_of(lanes: Sequence[Lane]) -> list[Member]:
    """All rows of these lanes."""
    return [(lane, slot) for lane in lanes for slot in range(len(lane.rows))]
