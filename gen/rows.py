"""Rows in flight over one network: the one loop that every picture and every prior embedding goes through.

`Rows` holds rows of any prompts, settings and noise levels. A tick takes every row one step: it lists the
evaluations (row, condition, weight), asks the network for them in as few calls as memory allows, weighs the answers
back into their rows and lets `samplers.advance` move the state. Rows are admitted, dropped and finished one by one,
and none ever depends on the others; when a call fails, the rows in it are out and the others go on. Nothing here
waits for the device. It knows no requests, no prompts, no autoencoder and no ranking.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from gen.bucket import PROBE, Buckets, is_out_of_memory
from gen.conditioning import Conditions
from gen.lane import MOMENTUM, Call, Lane, Plan, Walk, alike, lane_of, sent
from gen.row import Live, Row
from samplers.guidance import combine, in_interval, rescale
from samplers.sample import advance, needs_noise, start
from samplers.scaling import Scaling, denoiser
from samplers.state import Denoise, Prediction, State, per_row
from samplers.wrap import thresholded, towards

Network = Callable[[Tensor, Tensor, Conditions], Tensor]
"""network(input (M, ...), timestep (M,), conditions of M) -> output (M, ...)"""


class Likeness(Protocol):
    """How much pictures in the making are like what they are to show."""

    def __call__(self, x0: Tensor, *, target: Tensor) -> Tensor:
        """x0 (B, ...) and targets (B, E) -> (B,), the higher the better; differentiable."""


# --- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Taken:
    """A step that rows of a lane have just taken together."""

    rows: list[Live]
    x0: Tensor  # (B, ...) their clean estimates
    evaluations: list[int]  # of the network, of each row
    gradients: list[int]  # of the likeness, of each row


@dataclass(frozen=True, eq=False)
class Finished:
    """A row that has reached its last level."""

    row: Row
    x: Tensor  # (...) float32


@dataclass(frozen=True, eq=False)
class Failed:
    """Rows that are out because a call that they shared has failed."""

    rows: list[Row]
    error: Exception


@dataclass(eq=False)
class Tick:
    """What happened in one step of all rows."""

    taken: list[Taken] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


# --- the loop ----------------------------------------------------------------------------------------------------


class CallFailed(Exception):
    """A network call raised, or a gradient; `__cause__` says what."""

    def __init__(self, slots: Sequence[int]) -> None:
        super().__init__()
        self.slots = slots  # the row of each of its evaluations


@dataclass(eq=False)
class Heard:
    """What the denoiser of a step has said so far."""

    x0: Tensor | None = None  # (B, ...) its latest estimate
    num_asked: int = 0
    momentum: Tensor | None = None  # (B, ...) the running differences of rows that follow apg; None: no row has one


@dataclass(frozen=True, eq=False)
class Moved:
    """A step that has been worked out and not yet taken."""

    state: State
    x0: Tensor
    num_asked: int  # times that every evaluation was asked; 2 of Heun's steps


@dataclass(eq=False)
class Rows:
    """Rows over one network; see the module."""

    network: Network
    scaling: Scaling
    stage: str  # whose noise the rows draw: "decoder", "prior", ...
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    buckets: Buckets = field(default_factory=Buckets)  # what is known of the memory that calls take
    likeness: Likeness | None = None  # None: no row has a clip_guidance_scale
    lanes: dict[Hashable, Lane] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scaling = self.scaling.to(self.device)

    @property
    def live(self) -> list[Live]:
        """The rows in flight."""
        return [live for lane in self.lanes.values() for live in lane.rows]

    @property
    def filling(self) -> float:
        """How many network calls the rows fill: from 1 on, further ones would hardly go faster beside them."""
        return sum(lane.filling for lane in self.lanes.values())

    def admit(self, rows: Sequence[Row]) -> None:
        """Let rows in at their first level, beside whatever is in flight."""
        grouped: dict[Hashable, list[Live]] = {}
        for row in rows:
            grouped.setdefault(lane_of(row), []).append(Live.of(row, self.stage))
        for key, live in grouped.items():
            first = live[0].row
            unit = [one.stream.at(0)[0] if one.row.start is None else one.row.start.float().cpu() for one in live]
            scales = torch.tensor([one.row.schedule.start_scale for one in live])
            state = start(first.sampler, sent(torch.stack(unit), self.device), sent(scales, self.device))
            bucket = self.buckets.of(self.stage, first.shape, self.device)
            self.join(key, Lane(first.sampler, live, state, Walk.of(live, self.device), bucket))

    def join(self, key: Hashable, lane: Lane) -> None:
        """Let a lane's rows in as they stand."""
        if key in self.lanes:
            here = self.lanes[key]
            here.rows, here.plan = here.rows + lane.rows, None
            here.state = alike(here.state, lane.state).cat(alike(lane.state, here.state))
            here.walk = here.walk.cat(lane.walk)
        else:
            self.lanes[key] = lane

    def tick(self) -> Tick:
        """Take every row one step; the rows that reached their last level leave, and so do those that failed."""
        tick = Tick()
        for lane in list(self.lanes.values()):
            taken = self._step(lane, tick.failed)
            if taken is not None:
                tick.taken.append(taken)
            ended = {slot for slot, one in enumerate(lane.rows) if one.steps_left == 0}
            for slot in sorted(ended):
                row = lane.rows[slot].row
                tick.finished.append(Finished(row, lane.state.x[slot] * row.schedule.end_scale))
            self._take_out(lane, ended)
        return tick

    def drop(self, keys: AbstractSet[Hashable]) -> None:
        """Give up the rows of these keys; the others do not notice."""
        for lane in list(self.lanes.values()):
            self._take_out(lane, {slot for slot, one in enumerate(lane.rows) if one.row.key in keys})

    def halt(self, keys: AbstractSet[Hashable]) -> dict[Hashable, Lane]:
        """Take the rows of these keys out as they stand, each a lane of its own that `resume` takes."""
        halted: dict[Hashable, Lane] = {}
        for lane in list(self.lanes.values()):
            out = {slot: one for slot, one in enumerate(lane.rows) if one.row.key in keys}
            for slot, one in out.items():
                at = sent(torch.tensor([slot]), self.device)
                state, walk = lane.state.select(at), lane.walk.select(at)
                halted[one.row.key] = replace(lane, rows=[one], state=state, walk=walk, plan=None)
            self._take_out(lane, out.keys())
        return halted

    def resume(self, halted: Iterable[Lane]) -> None:
        """Let rows in again from where they were halted."""
        for lane in halted:
            self.join(lane_of(lane.rows[0].row), lane)

    def branch(self, halted: Lane, key: Hashable, seed: int) -> Lane:
        """A copy of a halted row that goes on by the noise of another seed."""
        (one,) = halted.rows
        past = (*one.row.past, (one.row.seed, one.index))
        row = replace(one.row, key=key, seed=seed, past=past)
        return replace(halted, rows=[Live.of(row, self.stage, one.index)])

    def run(self, rows: Iterable[Row], max_rows: int | None = None) -> Iterator[list[Finished]]:
        """Tick until every row has finished or was dropped, at most `max_rows` in flight (None: all).

        Yields after every tick what finished in it, so the caller can look, drop rows or stop. Raises what a
        network call raised. It keeps no row that has finished, nor what only that one was told.
        """
        waiting = deque(rows)
        del rows
        while waiting or self.lanes:
            room = len(waiting) if max_rows is None else min(max_rows - len(self.live), len(waiting))
            self.admit([waiting.popleft() for _ in range(room)])
            tick = self.tick()
            for failed in tick.failed:
                raise failed.error
            yield tick.finished

    def _take_out(self, lane: Lane, slots: AbstractSet[int]) -> None:
        if not slots:
            return
        kept = [slot for slot in range(len(lane.rows)) if slot not in slots]
        lane.rows, lane.plan = [lane.rows[slot] for slot in kept], None
        if kept:
            rows = sent(torch.tensor(kept), self.device)
            lane.state, lane.walk = lane.state.select(rows), lane.walk.select(rows)
        else:
            self.lanes = {key: other for key, other in self.lanes.items() if other is not lane}

    def _step(self, lane: Lane, failed: list[Failed]) -> Taken | None:
        """The lane's rows one step on; the same step again without the rows of a call that failed."""
        while lane.rows:
            outcome = self._worked_out(lane)
            if isinstance(outcome, Failed):
                failed.append(outcome)
                out = {id(row) for row in outcome.rows}
                self._take_out(lane, {slot for slot, one in enumerate(lane.rows) if id(one.row) in out})
            elif outcome is not None:  # None: memory ran out, and a smaller bucket tries again
                evaluations = [outcome.num_asked * len(one.terms) for one in lane.rows]
                gradients = [outcome.num_asked * bool(one.row.clip_guidance_scale) for one in lane.rows]
                lane.state, lane.walk = outcome.state, lane.walk.on()
                for one in lane.rows:
                    one.index += 1
                return Taken(lane.rows, outcome.x0, evaluations, gradients)
        return None

    def _worked_out(self, lane: Lane) -> Moved | Failed | None:
        if lane.plan is None or lane.plan.asking != [one.asking for one in lane.rows]:
            lane.bucket.refresh()
            lane.plan = Plan.of(lane, self.device)
        plan = lane.plan
        heard = Heard(momentum=lane.state.memory.get(MOMENTUM))
        try:
            noise = self._noise(lane, plan.options)
            denoise = self._denoise(lane, plan, heard)
            now, next = lane.walk.level(0), lane.walk.level(1)
            state = advance(lane.sampler, denoise, lane.state, now, next, noise, plan.options)
        except CallFailed as failure:
            cause = failure.__cause__
            assert isinstance(cause, Exception)
            return self._given_up(lane, failure.slots, cause)
        except Exception as error:
            return Failed([one.row for one in lane.rows], error)
        if heard.momentum is not None:
            state = state.remember(**{MOMENTUM: heard.momentum})
        assert heard.x0 is not None, "every step asks at least once"
        return Moved(state, heard.x0, heard.num_asked)

    def _given_up(self, lane: Lane, slots: Sequence[int], error: Exception) -> Failed | None:
        """The rows of a call that failed; None where it is to be asked again in smaller ones."""
        if is_out_of_memory(error):
            if lane.bucket.halve(len(slots)):
                return None
            error = lane.bucket.overflow(error)
        return Failed([lane.rows[slot].row for slot in sorted(set(slots))], error)

    def _noise(self, lane: Lane, options: dict[str, Tensor]) -> Tensor | None:
        """Fresh noise (B, ...) of the coming step; None where no row of the lane takes any."""
        if not needs_noise(lane.sampler, options):
            return None
        # block 0 was the start, so the step from level i draws block i + 1
        blocks = [one.stream.at(one.index + 1) if one.is_noisy else torch.zeros(1, *one.row.shape) for one in lane.rows]
        return sent(torch.cat(blocks), self.device)

    def _denoise(self, lane: Lane, plan: Plan, heard: Heard) -> Denoise:
        """The lane's rows as one denoiser, evaluations weighed into their rows; what it says is noted in `heard`."""

        def guided(x: Tensor, sigma: Tensor) -> Prediction:
            def mixed(values: Tensor, weights: Tensor) -> Tensor:
                return combine(values, weights, plan.rows, len(x))

            inside = in_interval(sigma, plan.interval)
            each = self._estimates(lane, plan, x, sigma)  # of M evaluations
            weights = torch.where(inside[plan.rows], plan.weights, plan.alone)
            x0 = mixed(each.x0, weights)
            if plan.guides is not None:
                prompt, null, before = mixed(each.x0, plan.alone), mixed(each.x0, 1 - plan.alone), heard.momentum
                index = lane.walk.index
                ruled, momentum = plan.guides.apply(x0, prompt, null, x, sigma, index, before, self.scaling)
                held = per_row(inside & plan.away, x)
                x0 = torch.where(held, ruled, x0)
                if momentum is not None:
                    heard.momentum = torch.where(held, momentum, 0.0 if before is None else before)
            if plan.rescale is not None:
                changed = rescale(x0, mixed(each.x0, plan.alone), x, sigma, plan.rescale, self.scaling)
                x0 = torch.where(per_row((plan.rescale > 0) & inside, x0), changed, x0)
            # guidance says where to go; how sure that is, the prompt's evaluation says alone, as in diffusers
            return Prediction(x0, None if each.variance is None else mixed(each.variance, plan.alone))

        denoise: Denoise = self._steered(guided, plan) if plan.steered else guided
        if plan.thresholding is not None:
            percentile, bound = plan.thresholding
            denoise = thresholded(denoise, percentile, bound=bound)

        def noted(x: Tensor, sigma: Tensor) -> Prediction:
            prediction = denoise(x, sigma)
            heard.x0, heard.num_asked = prediction.x0, heard.num_asked + 1
            return prediction

        return noted

    def _steered(self, guided: Denoise, plan: Plan) -> Denoise:
        """Rows that have a target guided towards it, within their interval, by the gradient of the likeness."""
        assert self.likeness is not None, "such rows are refused where there is none"
        likeness = self.likeness

        def steered(x: Tensor, sigma: Tensor) -> Prediction:
            prediction, inside = guided(x, sigma), in_interval(sigma, plan.interval)
            x0 = list(prediction.x0.split(1))
            for slot, scale, target in plan.steered:  # one by one, for a gradient through a picture takes much memory
                one = slice(slot, slot + 1)
                climb = towards(partial(_said, x0[slot]), partial(likeness, target=target), scale * inside[one])
                try:
                    x0[slot] = climb(x[one], sigma[one]).x0
                except Exception as error:
                    raise CallFailed([slot]) from error
            return Prediction(torch.cat(x0), prediction.variance)

        return steered

    def _estimates(self, lane: Lane, plan: Plan, x: Tensor, sigma: Tensor) -> Prediction:
        """What the network says of every evaluation, (M, ...), in as few calls as the bucket allows."""
        if lane.bucket.wants_probe(len(plan.slots)):
            told = Conditions(tuple(condition.twin() for condition in plan.conditions[:PROBE]))
            first, at = Call(0, PROBE, told), plan.rows[:PROBE]
            lane.bucket.probe(lambda: self._asked(first, plan.slots[:PROBE], x[at], sigma[at]))
        answers: list[Prediction] = []
        start = 0
        while start < len(plan.slots):
            call = plan.call(len(answers), start, lane.bucket.size)
            at, slots = plan.rows[call.start : call.stop], plan.slots[call.start : call.stop]
            answers.append(lane.bucket.ask(len(at), partial(self._asked, call, slots, x[at], sigma[at])))
            start = call.stop
        variances = [each.variance for each in answers if each.variance is not None]
        return Prediction(torch.cat([each.x0 for each in answers]), torch.cat(variances) if variances else None)

    def _asked(self, call: Call, slots: Sequence[int], x: Tensor, sigma: Tensor) -> Prediction:
        estimate = denoiser(lambda noisy, timestep: self.network(noisy, timestep, call.told), self.scaling)
        try:
            return estimate(x, sigma)
        except Exception as error:
            raise CallFailed(slots) from error


def _said(x0: Tensor, x: Tensor, sigma: Tensor) -> Prediction:
    """A denoiser that has spoken."""
    return Prediction(x0)
