"""What searches decide, carried out on their requests: who goes on, who is given up, copied or turned.

A `SearchRunner` asks each search of a request when its candidates are where they should be, and ends them all when the
request's time is over; a `PromptField` is what one of them sees and may ask for. It knows how candidates stand and
their rows, and neither networks nor who else is in flight.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gen.candidate import NoiseSegment
from gen.decode_queue import DecodeQueue
from gen.drafter import Drafter
from gen.edit import schedule_of
from gen.flight import DECODER, Flight, Goal, RowKey, Trail, Waiting, row_of, scores_of
from gen.model import Family
from gen.request import Job
from gen.search import Go, Move, Moves, Scout, SearchContext, in_rounds
from gen.stages import Stages
from samplers.sample import SAMPLERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SearchRunner:
    """What leads the searches of all requests; see the module."""

    model: Family
    stages: Stages
    decode_queue: DecodeQueue
    clock: Callable[[], float]  # seconds, by which budgets are spent

    def begin(self, flight: Flight[Any]) -> None:
        """Let a request's searches say what is painted first."""
        n, search = flight.job.num_images_per_prompt, flight.job.search
        for first in range(0, len(flight.candidates), n):
            prompt = PromptField(self, flight, range(first, first + n))
            moves = search(prompt) if flight.job.budget is None else in_rounds(search, prompt)
            flight.trails.append(Trail(prompt.candidates, moves))
        self.ask(flight)

    def asked(self, job: Job) -> SearchContext:
        """What a search is asked to work on."""
        first = job.candidates[0]
        sampler = first.settings.sampler
        options = self.model.levels.options(sampler) | first.settings.sampler_options
        adds = SAMPLERS[sampler].noise
        return SearchContext(
            num_candidates=job.num_images_per_prompt,
            keep=job.keep,
            is_noisy=any(options.get(name, SAMPLERS[sampler].defaults[name]) > 0 for name in adds),
            has_latents=first.latents is not None,
        )

    def num_steps(self, job: Job) -> int:
        """Steps of the decoder from the noise to a picture, which all of a job take alike."""
        settings = job.candidates[0].settings
        return schedule_of(self.model.levels, settings).num_steps

    def ask(self, flight: Flight[Any]) -> None:
        """Let those searches go on whose candidates are all where they should be, and halt what still waits for one."""
        for trail in flight.trails:
            while not trail.is_over and not any(index in flight.goals for index in trail.awaited):
                try:
                    move = next(trail.moves)
                except StopIteration:
                    trail.is_over = True
                    unpainted = [index for index in trail.candidates if index not in flight.painted]
                    if len(unpainted) == len(trail.candidates):
                        raise ValueError("the search gave up every candidate; one at least has to be painted") from None
                    self.give_up(flight, [index for index in unpainted if index not in flight.given_up])
                    for index in trail.candidates:  # with all that networks keep beside it
                        del flight.conditions[index]
                else:
                    trail.awaited = list(move.candidates)
                    self._set_going(flight, trail, move)
        self.stages.halt(flight, flight.halting)

    def hurry(self, flight: Flight[Any]) -> None:
        """The budget is spent: give up what is not painted, but of a prompt without any picture the nearest one."""
        flight.deadline = None
        for trail in flight.trails:
            if not trail.is_over:
                self._cut_short(flight, trail)
        self.ask(flight)

    def is_late(self, flight: Flight[Any]) -> bool:
        """Whether its budget is spent, and nobody has hurried yet."""
        return flight.deadline is not None and self.clock() >= flight.deadline

    def give_up(self, flight: Flight[Any], candidates: Collection[int]) -> None:
        """Give up candidates that are not painted."""
        if wrong := [index for index in candidates if index in flight.given_up or index in flight.painted]:
            raise ValueError(f"the search gives up candidates {wrong}, which are given up or painted")
        flight.give_up(candidates)
        self.stages.drop(flight.row_keys(candidates))

    def _set_going(self, flight: Flight[Any], trail: Trail, move: Move) -> None:
        """Give candidates a goal; those that are in no batch wait to be let in."""
        check_named(move.candidates, trail.candidates)
        goal = Goal(until=move.until) if isinstance(move, Go) else self._draft(flight, move)
        num_steps = self.num_steps(flight.job)
        if goal.until is not None and goal.until >= num_steps:
            problem = f"the search takes candidates to step {goal.until} of {num_steps}"
            raise ValueError(f"{problem}; leave until out where they are to be painted")
        if goal.draft_steps is not None and goal.draft_steps < 1:
            raise ValueError(f"the search scouts in {goal.draft_steps} steps; give 1 or more")
        for index in move.candidates:
            gone = index in flight.given_up or index in flight.painted
            if gone or (goal.draft_steps and index in flight.taken):
                raise ValueError(f"the search takes candidate {index} on, which is given up, painted or begun")
            if goal.until is not None and goal.until <= flight.taken.get(index, 0):
                raise ValueError(f"the search takes candidate {index} to step {goal.until}, which it has behind it")
        placed = flight.goals.keys() | flight.halting | flight.halted.keys()
        flight.goals |= dict.fromkeys(move.candidates, goal)
        flight.waiting.extend(self.stages.begin(flight, [index for index in move.candidates if index not in placed]))
        for index in move.candidates:
            flight.halting.discard(index)
            if index in flight.halted:
                flight.waiting.append(Waiting(DECODER, flight.halted.pop(index)))

    def _draft(self, flight: Flight[Any], move: Scout) -> Goal:
        if move.num_inference_steps is not None:
            return Goal(draft_steps=move.num_inference_steps)
        drafter = self.drafter_of(flight, move.candidates)
        if drafter is None:
            raise ValueError("the search scouts by a network for drafts, and none follows what is asked; give steps")
        return Goal(draft_steps=drafter.num_inference_steps, by_drafter=True)

    def drafter_of(self, flight: Flight[Any], candidates: Sequence[int]) -> Drafter | None:
        """The model's network for drafts; None where it has none, or none that follows all of these candidates."""
        drafter = self.model.drafter
        if drafter is None:
            return None
        if not self.asked(flight.job).is_noisy and all(drafter.follows(flight.candidates[at]) for at in candidates):
            return drafter
        logger.info("the network for drafts does not follow what is asked of it; the decoder paints drafts itself")
        return None

    def _cut_short(self, flight: Flight[Any], trail: Trail) -> None:
        trail.moves.close()
        trail.awaited = ()
        left = [index for index in trail.candidates if index not in flight.given_up]
        kept = [index for index in left if index in flight.painted]
        if not kept:
            nearest = max(left, key=lambda index: (index in flight.latents, flight.taken.get(index, -1), -index))
            self._stop_draft(flight, nearest)
            kept, trail.moves = [nearest], only(nearest)
        self.give_up(flight, [index for index in left if index not in kept])

    def _stop_draft(self, flight: Flight[Any], index: int) -> None:
        goal = flight.goals.get(index)
        if goal is not None and goal.draft_steps and index not in flight.awaiting_prior:
            del flight.goals[index]
            key = RowKey(flight.number, index, is_draft=True)
            flight.waiting = deque(each for each in flight.waiting if row_of(each.row).key != key)
            self.stages.drop({key})


@dataclass(frozen=True, eq=False)
class PromptField:
    """What a search sees of one prompt; see `gen.search.Field`."""

    runner: SearchRunner
    flight: Flight[Any]
    candidates: Sequence[int]

    @property
    def keep(self) -> int:
        """How many the user wants in the end."""
        return self.flight.job.keep

    @property
    def seed(self) -> int:
        """The first candidate's."""
        return self.flight.job.candidates[self.candidates[0]].seed

    @property
    def num_steps(self) -> int:
        """Steps of the decoder from the noise to a picture."""
        return self.runner.num_steps(self.flight.job)

    @property
    def has_drafter(self) -> bool:
        """Whether the model has a network for drafts that follows what is asked."""
        return self.runner.drafter_of(self.flight, self.candidates) is not None

    @property
    def scores(self) -> dict[int, float]:
        """CLIP's cosine of those that are painted."""
        painted = self.flight.painted
        return scores_of({index: painted[index] for index in self.candidates if index in painted})

    @property
    def sharpness(self) -> float:
        """1 / CLIP's temperature."""
        return float(self.runner.decode_queue.clip.logit_scale.exp())

    def previews(self, candidates: Sequence[int]) -> list[float]:
        """CLIP's cosine of a cheap look at their latest clean estimates."""
        check_named(candidates, self.candidates)
        if unseen := [index for index in candidates if index not in self.flight.estimates]:
            raise ValueError(f"the search looks at candidates {unseen}, which have not begun or are painted")
        return self.runner.decode_queue.look(self.flight, candidates)

    def drop(self, candidates: Sequence[int]) -> None:
        """Give up candidates that are not painted."""
        check_named(candidates, self.candidates)
        self.runner.give_up(self.flight, candidates)

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let targets go on from where the source has halted."""
        check_named([source, *targets], self.candidates)
        flight, stages = self.flight, self.runner.stages
        stages.halt(flight, flight.halting & {source, *targets})
        gone = flight.given_up | flight.painted.keys()
        if source not in flight.halted or any(index in flight.goals or index in gone for index in targets):
            raise ValueError(f"the search branches candidate {source} to {list(targets)}, which have not all halted")
        origin = flight.candidates[source]
        path = (*origin.noise_path, NoiseSegment(origin.seed, flight.taken[source]))
        for index in targets:
            flight.candidates[index] = replace(flight.candidates[index], noise_path=path)
            flight.halted[index] = stages.branch(flight, source, index)
            flight.conditions[index], flight.estimates[index] = flight.conditions[source], flight.estimates[source]
            flight.taken[index] = flight.taken[source]
            flight.awaiting_prior.discard(index)

    def turn(self, source: int, targets: Sequence[int], share: float) -> None:
        """Let targets begin near where the source began."""
        check_named([source, *targets], self.candidates)
        flight = self.flight
        begun = flight.goals.keys() | flight.taken.keys() | flight.given_up | flight.painted.keys()
        if source in flight.awaiting_prior or begun & set(targets):
            problem = f"the search turns candidates {list(targets)} towards {source}"
            raise ValueError(f"{problem}: of these some have begun or are given up, or its prior has not spoken")
        origin = flight.candidates[source]
        if origin.latents is not None:
            raise ValueError("the search turns noise that was handed in; leave latents out")
        path = (*origin.noise_path, NoiseSegment(origin.seed, 0, float(share)))
        for index in targets:
            flight.candidates[index] = replace(flight.candidates[index], noise_path=path)
            flight.conditions[index] = flight.conditions[source]
            flight.awaiting_prior.discard(index)

    def seconds_left(self) -> float:
        """Of the budget."""
        if self.flight.job.budget is None:
            return math.inf
        _ = self.scores  # what was painted has taken its time once the device is through with it
        return 0.0 if self.flight.deadline is None else self.flight.deadline - self.runner.clock()

    def among(self, candidates: Sequence[int]) -> PromptField:
        """The same with these candidates alone."""
        check_named(candidates, self.candidates)
        return replace(self, candidates=candidates)


def check_named(candidates: Sequence[int], own: Sequence[int]) -> None:
    """ValueError where a search names a candidate twice, or one that is not its own."""
    if len(set(candidates)) < len(candidates) or not set(candidates) <= set(own):
        raise ValueError(f"the search names candidates {list(candidates)}; give each once, of its own {list(own)}")


def only(candidate: int) -> Moves:
    """What is left of a search when its time is over before anything is painted."""
    yield Go([candidate])
