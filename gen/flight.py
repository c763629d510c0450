"""A request in flight: what it waits for, what it has so far and what it has taken.

All that is noted of a request while its candidates are painted, and what its callback sees of that. It moves nothing
itself: `gen.engine` does, and a search by `gen.search_runner`. It knows neither networks nor pictures.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from gen.candidate import Candidate
from gen.conditioning import ConditionPair
from gen.edit import EncodedImage
from gen.lane import Lane
from gen.prior import STAGE as PRIOR
from gen.request import Job
from gen.row import Live, Row
from gen.rows import Finished, Taken
from gen.search import Moves, best_first
from gen.upscale import STAGE as SUPER_RESOLUTION

Stage = Literal["prior", "decoder", "super_resolution"]
DECODER: Final = "decoder"
NULL: Final = -1  # in place of a prior sample's number: what the candidate is guided away from

R = TypeVar("R")


# --- what others see of it ---------------------------------------------------------------------------------------


class Cancelled(Exception):
    """A callback asked to stop; nothing of the request is kept."""


@dataclass(frozen=True, eq=False)
class Step:
    """What a callback sees after every step that pictures of its request take together."""

    stage: str  # "prior", "decoder" or "super_resolution"
    seeds: list[int]  # of the B pictures that took this step together
    steps_left: list[int]
    x0: Tensor  # (B, ...) the clean estimates: latents, or embeddings in the prior

    def cancel(self) -> None:
        """Stop the request, whose answer is then `Cancelled`."""
        raise Cancelled(f"cancelled in the {self.stage} with {max(self.steps_left)} steps left")


Callback = Callable[[Step], None]


@dataclass(eq=False)
class Account:
    """What a request has taken; a step that had to be worked out again is counted once."""

    evaluations: dict[str, int] = field(default_factory=lambda: {PRIOR: 0, DECODER: 0, SUPER_RESOLUTION: 0})
    gradients: int = 0  # through the autoencoder and CLIP, of clip_guidance_scale
    decodes: int = 0  # by the autoencoder
    previews: int = 0  # by what stands in for it while a search looks on; of small pictures the autoencoder does
    scores: int = 0  # pictures that CLIP has read, previews among them


@dataclass(frozen=True, eq=False)
class Painted:
    """A candidate's end, on the device."""

    latents: Tensor  # (C, h, w)
    pixels: Tensor | None = None  # (3, H, W) in [0, 1]; None: nobody asked for them, or others are kept
    score: Tensor | None = None  # (), on the CPU once `scored` is; None: not ranked
    scored: torch.cuda.Event | None = None  # None: it has been, or never is
    embedding: Tensor | None = None  # (E,) CLIP's of the picture; None: not ranked


# --- what is noted of it -----------------------------------------------------------------------------------------


class RowKey(NamedTuple):
    """The key of an engine's rows."""

    request: int
    candidate: int
    is_draft: bool = False  # a scout's
    prior_sample: int = 0  # which of those that the prior is asked for, or `NULL`


class Waiting(NamedTuple):
    """A row to be let in: at its beginning, or where it was halted."""

    stage: Stage
    row: Row | Lane


@dataclass(frozen=True)
class Goal:
    """How far a candidate is to be taken."""

    until: int | None = None  # steps of the decoder; None: to its end
    draft_steps: int | None = None  # of a scout; None: the picture itself
    by_drafter: bool = False  # whether the model's network for drafts paints it


@dataclass(eq=False)
class Trail:
    """A search at work on one prompt."""

    candidates: Sequence[int]
    moves: Moves
    awaited: Sequence[int] = ()
    is_over: bool = False


@dataclass(eq=False)
class Flight(Generic[R]):
    """A request in flight: what it waits for, and what it has so far. Candidates go by their place in drawing order.

    Each candidate that is not given up is at rest or has a goal. It rests before it has begun, where it was halted,
    after a draft, and at its end.
    """

    number: int
    job: Job
    callback: Callback | None
    deadline: float | None  # by the engine's clock; None: there is none, or it has passed
    future: Future[R] = field(default_factory=Future)
    trails: list[Trail] = field(default_factory=list)  # one for each prompt
    candidates: list[Candidate] = field(default_factory=list)  # with the noise path that the search has made
    given_up: set[int] = field(default_factory=set)
    goals: dict[int, Goal] = field(default_factory=dict)
    waiting: deque[Waiting] = field(default_factory=deque)  # rows to be let in, of candidates that have a goal
    awaiting_prior: set[int] = field(default_factory=set)  # those that the prior is to be asked for
    answers: dict[int, dict[int, Finished]] = field(default_factory=dict)  # of the prior, until all of one are there
    # Of each candidate whose search is not over; once its prior has spoken, with its answer.
    conditions: dict[int, ConditionPair] = field(default_factory=dict)
    read: list[EncodedImage | None] = field(default_factory=list)  # of each candidate, its picture handed in
    taken: dict[int, int] = field(default_factory=dict)  # the decoder's steps, of those that have begun
    halting: set[int] = field(default_factory=set)  # those that are where they should halt, and still in a batch
    halted: dict[int, Lane] = field(default_factory=dict)
    estimates: dict[int, Tensor] = field(default_factory=dict)  # the decoder's latest, clean
    latents: dict[int, Tensor] = field(default_factory=dict)  # finished, to be decoded
    painted: dict[int, Painted] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)  # CLIP's embedding (E,) of each prompt, once asked for
    account: Account = field(default_factory=Account)

    @property
    def is_through(self) -> bool:
        """Whether nothing of it has a step to take before something of it is decoded."""
        return self.goals.keys() <= self.latents.keys()

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to wait for."""
        return all(trail.is_over for trail in self.trails)

    @property
    def wants_pixels(self) -> bool:
        """Whether anybody looks at its pictures."""
        return self.job.rank or self.job.output_type != "latent"

    @property
    def lets_go(self) -> bool:
        """Whether the best alone keep their pixels while others are still painted."""
        return self.job.keep < self.job.num_images_per_prompt and not self.job.diverse

    def row_keys(self, candidates: Iterable[int]) -> set[Hashable]:
        """The keys of these candidates' rows."""
        settings = {index: self.job.candidates[index].settings for index in candidates}
        asked = {index: range(each.num_prior_samples) for index, each in settings.items()}
        prior = {
            RowKey(self.number, index, prior_sample=k) for index, samples in asked.items() for k in (*samples, NULL)
        }
        return prior | {RowKey(self.number, index, is_draft) for index in settings for is_draft in (False, True)}

    def take(self, stage: Stage, taken: Taken, slots: Sequence[int]) -> None:
        """Note a step of its rows, which are at these slots, and let the callback look."""
        rows = [taken.rows[slot] for slot in slots]
        self.account.evaluations[stage] += sum(taken.evaluations[slot] for slot in slots)
        self.account.gradients += sum(taken.gradients[slot] for slot in slots)
        if stage == DECODER:
            estimates = taken.x0.unbind(0)
            for slot, one in zip(slots, rows, strict=True):
                self.estimates[row_key(one.row).candidate] = estimates[slot]
                self.step(one)
        if self.callback is not None:
            everyone = len(slots) == len(taken.rows)
            self.callback(
                Step(
                    stage=stage,
                    seeds=[self._seed(stage, one.row) for one in rows],
                    steps_left=[one.steps_left for one in rows],
                    x0=taken.x0 if everyone else torch.stack([taken.x0[slot] for slot in slots]),
                )
            )

    def _seed(self, stage: Stage, row: Row) -> int:
        """The candidate's, whichever of the prior's answers this is."""
        return self.candidates[row_key(row).candidate].first_seed if stage == PRIOR else row.seed

    def step(self, one: Live) -> None:
        """Note where a row of the decoder stands; where it should halt, its candidate is at rest."""
        key = row_key(one.row)
        if not key.is_draft:
            self.taken[key.candidate] = one.taken
            if one.taken == self.goals[key.candidate].until:
                del self.goals[key.candidate]
                self.halting.add(key.candidate)

    def paint(self, index: int, painted: Painted) -> None:
        """Note a candidate's end."""
        self.painted[index] = painted  # first: Ctrl-C can come behind each
        del self.latents[index], self.goals[index]
        self.estimates.pop(index, None)
        self.account.decodes += painted.pixels is not None
        self.account.scores += painted.score is not None

    def thin(self) -> None:
        """Let go of the pixels that cannot be kept any more, where the best alone are.

        Their scores were asked for with the pictures before those that come now, so the device is hardly waited for.
        Where near-copies are left out any of them may be kept.
        """
        n, keep = self.job.num_images_per_prompt, self.job.keep
        if not self.lets_go or len(self.painted) <= keep:
            return
        scores = scores_of(self.painted)
        found = [scores.get(index, math.nan) for index in range(len(self.candidates))]
        best = {index for group in best_first(found, n, keep) for index in group}
        for index in scores.keys() - best:
            self.painted[index] = replace(self.painted[index], pixels=None)

    def give_up(self, candidates: Collection[int]) -> None:
        """Forget these candidates."""
        self.given_up |= set(candidates)
        for known in (self.goals, self.halted, self.estimates, self.latents, self.taken, self.answers):
            for index in candidates:
                known.pop(index, None)
        self.halting.difference_update(candidates)
        gone = self.row_keys(candidates)
        self.waiting = deque(each for each in self.waiting if row_of(each.row).key not in gone)

    def end(self) -> None:
        """Let go of the searches, which hold on to it."""
        for trail in self.trails:
            with suppress(Exception):  # of a search that somebody wrote, which has nobody left to tell
                trail.moves.close()
        self.trails.clear()
        self.waiting.clear()


def row_key(row: Row) -> RowKey:
    """Whose row it is."""
    assert isinstance(row.key, RowKey)
    return row.key


def row_of(waiting: Row | Lane) -> Row:
    """The row that waits."""
    return waiting if isinstance(waiting, Row) else waiting.rows[0].row


def scores_of(painted: Mapping[int, Painted]) -> dict[int, float]:
    """The score of each candidate; the device is waited for until these are known, and no longer."""
    found: dict[int, float] = {}
    for index, each in painted.items():
        if each.scored is not None:
            each.scored.synchronize()
        if each.score is not None:
            found[index] = each.score.item()
    return found
