"""Rows in flight: the one loop that every picture and every prior embedding goes through.

An `Engine` holds rows of any prompts, settings and noise levels over one network. A tick takes every row one
step: it lists the evaluations (row, condition, weight), asks the network for all of them at once, weighs the
answers back into their rows and lets `samplers.advance` move the state. Rows are admitted, dropped and
finished one by one, and none ever depends on the others. The engine knows no prompts, no autoencoder and no
ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gen.conditioning import Conditions, Table
from samplers.guidance import cfg_terms, combine, in_interval, rescale
from samplers.noise import NoiseStream
from samplers.sample import SAMPLERS, advance
from samplers.scaling import Scaling, denoiser
from samplers.schedule import Schedule
from samplers.state import Denoise, Level, Prediction, State, per_row, start

Network = Callable[[Tensor, Tensor, Conditions], Tensor]
"""network(input (M, ...), timestep (M,), conditions of M) -> output (M, ...)"""


@dataclass(frozen=True, eq=False)
class Row:
    """One picture in the making, as it is admitted; it is never changed."""

    key: int  # the caller's name for it
    seed: int
    schedule: Schedule
    sampler: str
    prompt: int  # the condition that counts, an index into the table
    null: int | None = None  # the condition guided away from; None only where guidance_scale is 1
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None  # guided where low < sigma <= high; None: everywhere
    guidance_rescale: float = 0.0
    eta: float | None = None  # None: the sampler's own
    start: Tensor | None = None  # unit noise in place of the seed's block 0


@dataclass(eq=False)
class Live:
    """A row in flight: where it stands, and where its noise comes from."""

    row: Row
    stream: NoiseStream
    eta: float
    index: int = 0  # steps taken

    @property
    def terms(self) -> list[tuple[int, float]]:
        """(condition, weight) to evaluate on the coming step; weights sum to one."""
        row = self.row
        if row.null is None or not self._guided():
            return [(row.prompt, 1.0)]
        weights = cfg_terms(row.guidance_scale)
        return [(row.null, weights["null"]), (row.prompt, weights["prompt"])]

    def _guided(self) -> bool:
        if self.row.guidance_scale == 1:
            return False
        if self.row.guidance_interval is None:
            return True
        low, high = self.row.guidance_interval
        # a sampler may ask at the level it goes to as well (Heun)
        ends = self.row.schedule.sigmas[self.index : self.index + 2].tolist()
        return any(low < sigma <= high for sigma in ends)


@dataclass(eq=False)
class Lane:
    """Rows that share a state: one sampler, one shape."""

    sampler: str
    rows: list[Live]
    state: State


@dataclass(frozen=True, eq=False)
class Taken:
    """A step that rows of a lane have just taken together."""

    rows: list[Live]
    x0: Tensor  # (B, ...) their clean estimates


@dataclass(frozen=True, eq=False)
class Finished:
    """A row that has reached its last level."""

    row: Row
    x: Tensor  # (...) float32


@dataclass(eq=False)
class Engine:
    """Rows over one network; see the module."""

    network: Network
    scaling: Scaling
    table: Table
    stage: str  # whose noise the rows draw: "decoder", "prior", ...
    shape: Callable[[Row], tuple[int, ...]]  # of one row's x
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lanes: dict[Hashable, Lane] = field(default_factory=dict)
    last: list[Taken] = field(default_factory=list)  # the steps of the last tick, finished rows included
    num_steps_taken: int = 0  # of all rows together

    def __post_init__(self) -> None:
        self.scaling = self.scaling.to(self.device)

    @property
    def live(self) -> list[Live]:
        """The rows in flight."""
        return [live for lane in self.lanes.values() for live in lane.rows]

    def admit(self, rows: Sequence[Row]) -> None:
        """Let rows in at their first level, beside whatever is in flight."""
        grouped: dict[Hashable, list[Row]] = {}
        for row in rows:
            grouped.setdefault(self._lane(row), []).append(row)
        for key, members in grouped.items():
            shape = self.shape(members[0])
            live = []
            for row in members:
                eta = SAMPLERS[row.sampler].defaults.get("eta", 0.0) if row.eta is None else row.eta
                live.append(Live(row, NoiseStream([row.seed], self.stage, shape), eta))
            unit = [one.stream.at(0)[0] if one.row.start is None else one.row.start.float().cpu() for one in live]
            scales = torch.tensor([row.schedule.start_scale for row in members])
            state = start(members[0].sampler, torch.stack(unit).to(self.device), scales.to(self.device))
            if key in self.lanes:
                lane = self.lanes[key]
                lane.rows, lane.state = lane.rows + live, lane.state.cat(state)
            else:
                self.lanes[key] = Lane(members[0].sampler, live, state)

    def tick(self) -> list[Finished]:
        """Take every row one step; the rows that reached their last level leave."""
        finished, self.last = [], []
        for lane in list(self.lanes.values()):
            self.last.append(self._step(lane))
            self.num_steps_taken += len(lane.rows)
            done = [one.index == one.row.schedule.num_steps for one in lane.rows]
            for slot, one in enumerate(lane.rows):
                if done[slot]:
                    finished.append(Finished(one.row, lane.state.x[slot] * one.row.schedule.end_scale))
            if any(done):
                self._keep(lane, [slot for slot in range(len(done)) if not done[slot]])
        return finished

    def drop(self, keys: set[int]) -> None:
        """Give up the rows of these keys; the others do not notice."""
        for lane in list(self.lanes.values()):
            kept = [slot for slot, one in enumerate(lane.rows) if one.row.key not in keys]
            if len(kept) < len(lane.rows):
                self._keep(lane, kept)

    def run(self, rows: Sequence[Row], max_rows: int | None = None) -> Iterator[list[Finished]]:
        """Tick until every row has finished or was dropped, at most `max_rows` in flight (None: all).

        Yields after every tick what finished in it, so the caller can look, drop rows or stop.
        """
        waiting = list(rows)
        while waiting or self.lanes:
            room = len(waiting) if max_rows is None else max_rows - len(self.live)
            if room > 0 and waiting:
                self.admit(waiting[:room])
                waiting = waiting[room:]
            yield self.tick()

    def _lane(self, row: Row) -> Hashable:
        tokens = self.table.conditions[row.prompt].tokens
        return row.sampler, self.shape(row), None if tokens is None else tokens.shape

    def _keep(self, lane: Lane, slots: list[int]) -> None:
        if not slots:
            self.lanes = {key: other for key, other in self.lanes.items() if other is not lane}
            return
        lane.rows = [lane.rows[slot] for slot in slots]
        lane.state = lane.state.select(torch.tensor(slots, device=self.device))

    def _step(self, lane: Lane) -> Taken:
        now, next = self._level(lane.rows, 0), self._level(lane.rows, 1)
        noise, options = self._noise(lane)
        seen: list[Tensor] = []
        denoise = self._denoise(lane, seen)
        lane.state = advance(lane.sampler, denoise, lane.state, now, next, noise, options)
        for one in lane.rows:
            one.index += 1
        return Taken(lane.rows, seen[-1])

    def _level(self, rows: Sequence[Live], ahead: int) -> Level:
        at = [one.index + ahead for one in rows]
        sigma = [one.row.schedule.sigmas[index].item() for one, index in zip(rows, at, strict=True)]
        left = [one.row.schedule.num_steps - index for one, index in zip(rows, at, strict=True)]
        return Level(
            torch.tensor(sigma, dtype=torch.float32, device=self.device),
            torch.tensor(at, device=self.device),
            torch.tensor(left, device=self.device),
        )

    def _noise(self, lane: Lane) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Fresh noise of this step and the sampler's options; neither where no row of the lane takes any."""
        if "eta" not in SAMPLERS[lane.sampler].defaults:
            return None, {}
        if not any(one.eta for one in lane.rows) and SAMPLERS[lane.sampler].defaults["eta"] == 0:
            return None, {}
        # block 0 was the start, so the step from level i draws block i + 1
        blocks = [one.stream.at(one.index + 1) if one.eta else torch.zeros(1, *one.stream.shape) for one in lane.rows]
        eta = torch.tensor([one.eta for one in lane.rows], device=self.device)
        return torch.cat(blocks).to(self.device, non_blocking=True), {"eta": eta}

    def _denoise(self, lane: Lane, seen: list[Tensor]) -> Denoise:
        """The lane's rows as one denoiser: every evaluation in one network call, weighed into its row.

        What it answers is also put into `seen`.
        """
        evaluations = sorted(
            (condition, slot, weight) for slot, one in enumerate(lane.rows) for condition, weight in one.terms
        )  # grouped by condition
        told = self.table.gather([condition for condition, _, _ in evaluations])
        prompts = [one.row.prompt for one in lane.rows]
        alone = [float(condition == prompts[slot]) for condition, slot, _ in evaluations]
        rows = torch.tensor([slot for _, slot, _ in evaluations], device=self.device)
        weights = torch.tensor([weight for _, _, weight in evaluations], device=self.device)
        unguided = torch.tensor(alone, device=self.device)
        intervals = [one.row.guidance_interval or (-math.inf, math.inf) for one in lane.rows]
        low, high = torch.tensor(intervals, device=self.device).unbind(1)
        factor = torch.tensor([one.row.guidance_rescale for one in lane.rows], device=self.device)
        rescaled = any(one.row.guidance_rescale for one in lane.rows)
        estimate = denoiser(lambda x, timestep: self.network(x, timestep, told), self.scaling)

        def denoise(x: Tensor, sigma: Tensor) -> Prediction:
            guided = in_interval(sigma, (low, high))
            each = estimate(x[rows], sigma[rows]).x0  # (M, ...)
            x0 = combine(each, torch.where(guided[rows], weights, unguided), rows, len(x))
            if rescaled:
                prompt = combine(each, unguided, rows, len(x))
                changed = rescale(x0, prompt, x, sigma, factor, self.scaling)
                x0 = torch.where(per_row((factor > 0) & guided, x0), changed, x0)
            seen.append(x0)
            return Prediction(x0)

        return denoise
