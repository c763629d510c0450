"""Rows in flight over one network: the one loop that every picture and every prior embedding goes through.

`Rows` holds rows of any prompts, settings and noise levels. A tick takes every row one step: it lists the evaluations
(row, condition, weight), asks the network for them in as few calls as memory allows, those of all samplers together,
weighs the answers back into their rows and lets `samplers.sample.advance` move the state. Rows are admitted, dropped
and finished one by one, and none ever depends on the others; when a call fails, the rows in it are out and the others
go on. Nothing here waits for the device. It knows no requests, no prompts, no autoencoder and no ranking.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from clip_core.device import to_device
from gen.attempt import Attempt, Blame, Member, Question, StepFailed, blaming
from gen.bucket import PATIENCE, PROBE, Bucket, Buckets, is_out_of_memory
from gen.conditioning import Conditions
from gen.lane import MOMENTUM, Lane, LevelTable, NetworkCall, Pass, Plan, alike, batch_of, lane_of
from gen.row import Live, Row
from gen.weighing import guided_denoiser
from samplers.sample import needs_noise, start_from
from samplers.scaling import Preconditioning, Scaling
from samplers.state import Prediction

Network = Callable[[Tensor, Tensor, Conditions], Tensor]
"""network(input (M, ...), timestep (M,), conditions of M) -> output (M, ...)"""


# --- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Taken:
    """A step that rows of a lane have just taken together."""

    rows: list[Live]
    x0: Tensor  # (B, ...) their clean estimates
    evaluations: list[int]  # of the network, of each row
    gradients: list[int]  # of its likeness, of each row


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


@dataclass(eq=False)
class Rows:
    """Rows over one network; see the module."""

    network: Network
    scaling: Scaling
    stage: str  # whose noise the rows draw: "decoder", "prior", ...
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    buckets: Buckets = field(default_factory=Buckets)  # what is known of the memory that calls take
    lanes: dict[Hashable, Lane] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)  # those whose plans hold
    lost: list[Failed] = field(default_factory=list)  # when others were taken out of their lane; the next tick tells

    def __post_init__(self) -> None:
        self.scaling = self.scaling.to(self.device)

    @property
    def live(self) -> list[Live]:
        """The rows in flight."""
        return [live for lane in self.lanes.values() for live in lane.rows]

    @property
    def filling(self) -> float:
        """How many network calls the rows fill: from 1 on, further ones would hardly make each faster."""
        return sum(lane.num_evaluations / lane.bucket.enough for lane in self.lanes.values())

    def num_evaluations(self, shape: tuple[int, ...]) -> int:
        """Of the rows of one shape, each time that the network is asked on the coming step."""
        return sum(lane.num_evaluations for lane in self.lanes.values() if lane.rows[0].row.shape == shape)

    def bucket_of(self, shape: tuple[int, ...]) -> Bucket:
        """Of the rows of one shape."""
        return self.buckets.of(self.stage, shape, self.device)

    def admit(self, rows: Sequence[Row]) -> None:
        """Let rows in at their first level, beside whatever is in flight."""
        grouped: dict[Hashable, list[Live]] = {}
        for row in rows:
            grouped.setdefault(lane_of(row), []).append(Live.of(row, self.stage))
        for key, live in grouped.items():
            first = live[0].row
            unit = to_device(torch.stack([one.start for one in live]), self.device)
            nothing = torch.zeros(first.shape, device=self.device)
            origins = [one.row.origin for one in live]
            x0 = torch.stack([nothing if origin is None else origin.to(self.device) for origin in origins])
            scales = [one.row.schedule.start_scale if one.row.origin is None else one.first_sigma for one in live]
            state = start_from(first.sampler, x0, unit, to_device(torch.tensor(scales), self.device))
            table = LevelTable.of(live, self.scaling, self.device)
            self.join(key, Lane(first.sampler, live, state, table, self.bucket_of(first.shape)))

    def join(self, key: Hashable, lane: Lane) -> None:
        """Let a lane's rows in as they stand."""
        if key in self.lanes:
            here = self.lanes[key]
            state = alike(here.state, lane.state).cat(alike(lane.state, here.state))
            table = here.table.cat(lane.table)
            self._unplan(here)
            here.rows, here.state, here.table = here.rows + lane.rows, state, table
        else:
            self.lanes[key] = lane

    def tick(self) -> Tick:
        """Take every row one step; the rows that reached their last level leave, and so do those that failed."""
        tick, together = Tick(), dict[Hashable, list[Lane]]()
        for lane in self.lanes.values():
            together.setdefault((batch_of(lane.rows[0].row), lane.apart), []).append(lane)
        groups = deque(together.values())
        while groups:
            lanes = groups.popleft()
            try:
                attempts = self._worked_out(lanes)
            except StepFailed as failure:
                groups.extendleft(reversed(self._after(failure, lanes, tick.failed)))
            else:
                lanes[0].bucket.succeed(sum(len(attempt.plan.slots) for attempt in attempts))
                tick.taken += [self._taken(attempt) for attempt in attempts]
                del attempts  # and all they hold, before the next are worked out
        for lane in list(self.lanes.values()):
            ended = {slot for slot, one in enumerate(lane.rows) if one.steps_left == 0}
            for slot in sorted(ended):
                row = lane.rows[slot].row
                try:
                    tick.finished.append(Finished(row, end_of(row, lane.state.x[slot])))
                except Exception as error:
                    tick.failed.append(Failed([row], error))
            self._take_out(lane, ended)
        tick.failed += self.lost
        self.lost = []
        return tick

    def drop(self, keys: AbstractSet[Hashable]) -> None:
        """Give up the rows of these keys; the others do not notice."""
        for lane in list(self.lanes.values()):
            self._take_out(lane, {slot for slot, one in enumerate(lane.rows) if one.row.key in keys})

    def clear(self) -> list[Row]:
        """Give up all rows, as an interrupted tick may have left them half way."""
        given_up = [one.row for one in self.live]
        self.lanes.clear()
        self.passes.clear()
        return given_up

    def halt(self, keys: AbstractSet[Hashable]) -> dict[Hashable, Lane]:
        """Take the rows of these keys out as they stand, each a lane of its own that `resume` takes."""
        halted: dict[Hashable, Lane] = {}
        for lane in list(self.lanes.values()):
            out = {slot: one for slot, one in enumerate(lane.rows) if one.row.key in keys}
            halted |= {one.row.key: self._those(lane, [slot]) for slot, one in out.items()}
            self._take_out(lane, out.keys())
        return halted

    def resume(self, halted: Iterable[Lane]) -> None:
        """Let rows in again from where they were halted."""
        for lane in halted:
            self.join(lane_of(lane.rows[0].row), lane)

    def branch(self, halted: Lane, key: Hashable, seed: int) -> Lane:
        """A copy of a halted row that goes on by the noise of another seed."""
        (one,) = halted.rows
        past = (*one.row.past, (one.row.seed, one.taken))
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

    def _those(self, lane: Lane, slots: Sequence[int]) -> Lane:
        """A copy of some of a lane's rows."""
        at = to_device(torch.tensor(slots), self.device)
        rows = [lane.rows[slot] for slot in slots]
        state, table = lane.state.select(at), lane.table.select(at)
        return replace(lane, rows=rows, state=state, table=table, plan=None, apart=None)

    def _take_out(self, lane: Lane, slots: AbstractSet[int]) -> None:
        """Give up these of a lane's rows; where there is no memory for the others by themselves, these are lost too."""
        if not slots:
            return
        kept = [slot for slot in range(len(lane.rows)) if slot not in slots]
        self._unplan(lane)
        try:
            rest = self._those(lane, kept) if kept else None
        except Exception as error:
            self.lost.append(Failed([lane.rows[slot].row for slot in kept], error))
            rest = None
        if rest is not None:
            lane.rows, lane.state, lane.table = rest.rows, rest.state, rest.table
        else:
            lane.rows = []
            self.lanes = {key: other for key, other in self.lanes.items() if other is not lane}

    def _put_apart(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Have the later half of these rows take their steps after the others for a while; it takes no memory."""
        apart, later = object(), list[Lane]()
        left = sum(len(lane.rows) for lane in lanes) // 2
        for lane in lanes:
            cut, left = min(left, len(lane.rows)), max(0, left - len(lane.rows))
            if cut < len(lane.rows):
                later.append(lane if cut == 0 else self._cut(lane, cut))
                later[-1].apart, later[-1].apart_for = apart, PATIENCE
        return later

    def _cut(self, lane: Lane, at: int) -> Lane:
        """A lane of its own for the rows behind its first `at`."""
        self._unplan(lane)
        first, rest = (
            replace(lane, rows=lane.rows[part], state=lane.state.select(part), table=lane.table.select(part))
            for part in (slice(at), slice(at, None))
        )
        lane.rows, lane.state, lane.table = first.rows, first.state, first.table
        self.lanes[object()] = rest
        return rest

    def _unplan(self, lane: Lane) -> None:
        """Its rows change, or what they ask."""
        self.passes = [each for each in self.passes if lane.plan not in each.plans]
        lane.plan = None

    def _worked_out(self, lanes: Sequence[Lane]) -> list[Attempt]:
        """The step of each lane; those that ask the network at one time ask it together."""
        with blaming(*lanes):
            attempts = []
            for lane in lanes:
                with blaming(lane):
                    attempts.append(self._attempt(lane))
            asking = attempts
            while questions := self._questions(asking):
                for (attempt, asked), each in zip(questions, self._estimates(questions), strict=True):
                    with blaming(attempt.lane):
                        attempt.predictions.append(guided_denoiser(attempt, each, self.scaling)(asked.x, asked.sigma))
                asking = [attempt for attempt, _ in questions]
            return attempts

    def _questions(self, asking: Sequence[Attempt]) -> list[tuple[Attempt, Question]]:
        """What these ask next, each as far as it has been told; who asks nothing is through."""
        questions = []
        for attempt in asking:
            with blaming(attempt.lane):
                asked = attempt.play()
            if asked is not None:
                questions.append((attempt, asked))
        return questions

    def _attempt(self, lane: Lane) -> Attempt:
        if lane.plan is None or lane.plan.asking != [one.asking for one in lane.rows]:
            self._unplan(lane)
            lane.plan = Plan.of(lane, self.device)
            lane.bucket.refresh()  # behind what the plan takes
        return Attempt(lane, lane.plan, self._noise(lane, lane.plan.options), lane.state.memory.get(MOMENTUM))

    def _taken(self, attempt: Attempt) -> Taken:
        """Take a step that has been worked out."""
        lane, num_asked = attempt.lane, len(attempt.predictions)
        assert attempt.end is not None and num_asked, "every step asks at least once"
        evaluations = [num_asked * number for number in attempt.plan.num_terms]
        gradients = [num_asked * is_clip_guided for _, is_clip_guided, _ in attempt.plan.asking]
        lane.state, lane.table = attempt.end.state, attempt.end.table
        for one in lane.rows:
            one.index += 1
        if lane.apart is not None:
            lane.apart_for -= 1
            lane.apart = lane.apart if lane.apart_for else None
        return Taken(lane.rows, attempt.end.x0, evaluations, gradients)

    def _after(self, failure: StepFailed, lanes: list[Lane], failed: list[Failed]) -> list[list[Lane]]:
        """Which groups of lanes are tried again after a failed step: what is left without the rows it failed for.

        Where memory ran out it is all of them, in smaller calls if a call had failed, or else in two parts; a row that
        fails alone is out.
        """
        error, members = failure.__cause__, failure.members
        assert isinstance(error, Exception)
        (bucket,) = {id(lane.bucket): lane.bucket for lane, _ in members}.values()
        if is_out_of_memory(error):
            failure.__traceback__ = error.__traceback__ = None  # its frames hold what the call had made
            if not failure.in_call and len(members) > 1:
                later = self._put_apart(list({id(lane): lane for lane, _ in members}.values()))
                return [[lane for lane in lanes if lane not in later], later]
            if bucket.halve(len(members)):
                return [lanes]
            error = bucket.overflow(error)
        out: dict[int, tuple[Lane, set[int]]] = {}
        for lane, slot in members:
            out.setdefault(id(lane), (lane, set()))[1].add(slot)
        failed.append(Failed([lane.rows[slot].row for lane, slots in out.values() for slot in sorted(slots)], error))
        for lane, slots in out.values():
            self._take_out(lane, slots)
        left = [lane for lane in lanes if lane.rows]
        return [left] if left else []

    def _noise(self, lane: Lane, options: dict[str, Tensor]) -> Tensor | None:
        """Fresh noise (B, ...) of the coming step; None where no row of the lane takes any."""
        if not needs_noise(lane.sampler, options):
            return None
        # block 0 was the start's, or that behind what was drawn for an edit, so step i draws block i + 1 after it
        blocks = [
            one.stream.at(one.row.drawn + one.taken + 1) if one.is_noisy else torch.zeros(1, *one.row.shape)
            for one in lane.rows
        ]
        return to_device(torch.cat(blocks), self.device)

    def _estimates(self, questions: Sequence[tuple[Attempt, Question]]) -> list[Prediction]:
        """What the network says of every evaluation of each lane, (M, ...), in as few calls as the bucket allows."""
        lanes = [attempt.lane for attempt, _ in questions]
        ask = self._pass(lanes, [attempt.plan for attempt, _ in questions])
        x = joined([each.x for _, each in questions])
        at_levels = [each.preconditioning or self.scaling.preconditioning(each.sigma) for _, each in questions]
        preconditioning = Preconditioning(joined([each.values for each in at_levels], 1))

        def asked(call: NetworkCall) -> Prediction:
            def whose() -> list[Member]:
                return [(lanes[number], slot) for number, slot in ask.owners[call.start : call.stop]]

            with Blame(whose, in_call=True):
                at = ask.rows[call.start : call.stop]
                # by index_select here and below, for x[at] wakes a thread per core, in milliseconds on some machines
                return self._asked(call.conditions, x.index_select(0, at), preconditioning.select(at))

        bucket, answers, start = lanes[0].bucket, list[Prediction](), 0
        if bucket.wants_probe(len(ask.owners)):
            twins = Conditions(tuple(condition.copy() for condition in ask.conditions[:PROBE]))
            bucket.probe(partial(asked, NetworkCall(0, PROBE, twins)))
        while start < len(ask.owners):
            call = ask.call(len(answers), start, bucket.size)
            answers.append(bucket.ask(call.stop - call.start, partial(asked, call)))
            start = call.stop
        x0, variances = joined([each.x0 for each in answers]), [each.variance for each in answers]
        variance = joined([each for each in variances if each is not None]) if variances[0] is not None else None
        if ask.places is None:
            return [Prediction(x0, variance)]
        return [
            Prediction(x0.index_select(0, at), None if variance is None else variance.index_select(0, at))
            for at in ask.places
        ]

    def _pass(self, lanes: Sequence[Lane], plans: list[Plan]) -> Pass:
        for known in self.passes:
            if known.plans == plans:
                return known
        self.passes.append(Pass.of(lanes, plans, self.device))
        return self.passes[-1]

    def _asked(self, conditions: Conditions, x: Tensor, preconditioning: Preconditioning) -> Prediction:
        def network(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.network(noisy, timestep, conditions)

        return preconditioning.ask(network, x, self.scaling.learned_range)


def joined(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """One behind the other; of one part itself, for on small tensors a copy takes as long as a step's arithmetic."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def end_of(row: Row, x: Tensor) -> Tensor:
    """What a row has come to, of its x (...) at its last level."""
    x = x * row.schedule.end_scale
    if row.known_region is None:
        return x
    # as it was handed in, also where the last level is not 0
    return torch.where(row.known_region.is_painted.to(x.device), x, row.known_region.clean.to(x.device))
