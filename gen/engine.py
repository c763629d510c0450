"""Requests in flight over one model: submitted from any thread, painted together by one loop, answered one by one.

An `Engine` turns requests into rows of the prior and of the decoder, ticks both, decodes and scores what has finished
while other rows go on, and resolves a request's future as soon as its own candidates are there. Requests share every
network call and nothing else: one that fails, is cancelled or gives candidates up takes its rows along, and the others
do not notice. It knows what every request is at, and neither samplers nor networks nor what an answer looks like.
"""

from __future__ import annotations

import atexit
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from time import monotonic
from types import TracebackType
from typing import Final, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from clip_core.clip import CLIP
from clip_core.score import cosine
from gen.bucket import PROBE, UNBOUNDED, Buckets, is_out_of_memory
from gen.conditioning import Condition, Conditions, Table, Told
from gen.prior import STAGE as PRIOR
from gen.prior import Prior
from gen.request import Abilities, Before, Candidate, Job, Request, Settings
from gen.rows import Finished, Lane, Live, Row, Rows, Taken
from gen.scheduler import NoiseLevels
from gen.search import Asked, Go, Move, Moves, in_rounds
from samplers.noise import noise
from samplers.sample import SAMPLERS

Stage = Literal["prior", "decoder"]
DECODER: Final = "decoder"
DECODE_CHUNK = 16  # pictures decoded and scored at once at most; the autoencoder is the largest user of memory

R = TypeVar("R")


# --- what others see of a request --------------------------------------------------------------------------------


class Cancelled(Exception):
    """A callback asked to stop; nothing of the request is kept."""


@dataclass(frozen=True, eq=False)
class Step:
    """What a callback sees after every step that pictures of its request take together."""

    stage: str  # "prior" or "decoder"
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

    evaluations: dict[str, int] = field(default_factory=lambda: {PRIOR: 0, DECODER: 0})  # of each network
    gradients: int = 0  # through the autoencoder and CLIP, of clip_guidance_scale
    decodes: int = 0  # by the autoencoder
    previews: int = 0  # by what stands in for it while a search looks on; of small pictures the autoencoder does
    scores: int = 0  # pictures that CLIP has read, previews among them


@dataclass(frozen=True, eq=False)
class Painted:
    """A candidate's end, on the device."""

    latents: Tensor  # (C, h, w)
    pixels: Tensor | None = None  # (3, H, W) in [0, 1]; None: nobody asked for them
    score: Tensor | None = None  # (); None: not ranked
    embedding: Tensor | None = None  # (E,) CLIP's of the picture; None: not ranked


Conclude = Callable[[Job, Mapping[int, Painted], Account], R]
"""conclude(job, those of its candidates that are painted, by their place in drawing order, account) -> the answer

The job's candidates are as they were painted: with the noise path that the search has made."""


class Family(Protocol):
    """A model as the engine asks it; `gen.families` has them."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""

    @property
    def abilities(self) -> Abilities:
        """What a request may ask for."""

    @property
    def levels(self) -> NoiseLevels:
        """The decoder's."""

    @property
    def prior(self) -> Prior | None:
        """None: there is none."""

    @property
    def clip(self) -> CLIP | None:
        """The CLIP that ranks; None: there is none."""

    def latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        """(C, h, w) of a picture of these settings."""

    def tell(self, candidates: Sequence[Candidate], table: Table) -> list[Told]:
        """What each candidate is told before any prior has spoken."""

    def call(self, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        """The decoder's network."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""

    def preview(self, latents: Tensor) -> Tensor:
        """The same, cheaply and roughly."""

    def is_small(self, settings: Settings) -> bool:
        """Whether pictures are so small that a search may look at them through the autoencoder itself."""


@runtime_checkable
class WithImage(Protocol):
    """A family that takes image embeddings, as every family with a prior does."""

    def show(
        self, candidates: Sequence[Candidate], told: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """What candidates are told, with an image embedding (E,) beside it."""


# --- a request in flight -----------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The key of an engine's rows."""

    request: int
    candidate: int
    is_draft: bool = False  # a scout's


class Waiting(NamedTuple):
    """A row to be let in: at its beginning, or where it was halted."""

    stage: Stage
    row: Row | Lane


@dataclass(frozen=True)
class Goal:
    """How far a candidate is to be taken."""

    until: int | None = None  # steps of the decoder; None: to its end
    draft_steps: int | None = None  # of a scout; None: the picture itself


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
    unspoken: set[int] = field(default_factory=set)  # those that the prior is to be asked for
    told: list[Told] = field(default_factory=list)  # of each candidate; once its prior has spoken, with its answer
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

    def places(self, candidates: Iterable[int]) -> set[Hashable]:
        """The keys of these candidates' rows."""
        return {Place(self.number, index, is_draft) for index in candidates for is_draft in (False, True)}

    def take(self, stage: Stage, taken: Taken, slots: Sequence[int]) -> None:
        """Note a step of its rows, which are at these slots, and let the callback look."""
        rows = [taken.rows[slot] for slot in slots]
        self.account.evaluations[stage] += sum(taken.evaluations[slot] for slot in slots)
        self.account.gradients += sum(taken.gradients[slot] for slot in slots)
        if stage == DECODER:
            for slot, one in zip(slots, rows, strict=True):
                self.estimates[place_of(one.row).candidate] = taken.x0[slot]
                self.step(one)
        if self.callback is not None:
            everyone = len(slots) == len(taken.rows)
            self.callback(
                Step(
                    stage=stage,
                    seeds=[one.row.seed for one in rows],
                    steps_left=[one.steps_left for one in rows],
                    x0=taken.x0 if everyone else torch.stack([taken.x0[slot] for slot in slots]),
                )
            )

    def step(self, one: Live) -> None:
        """Note where a row of the decoder stands; where it should halt, its candidate is at rest."""
        place = place_of(one.row)
        if not place.is_draft:
            self.taken[place.candidate] = one.index
            if one.index == self.goals[place.candidate].until:
                del self.goals[place.candidate]
                self.halting.add(place.candidate)

    def paint(self, index: int, painted: Painted) -> None:
        """Note a candidate's end."""
        del self.latents[index], self.goals[index]
        self.estimates.pop(index, None)
        self.painted[index] = painted
        self.account.decodes += painted.pixels is not None
        self.account.scores += painted.score is not None

    def give_up(self, candidates: Collection[int]) -> None:
        """Forget these candidates."""
        self.given_up |= set(candidates)
        for known in (self.goals, self.halted, self.estimates, self.latents, self.taken):
            for index in candidates:
                known.pop(index, None)
        self.halting.difference_update(candidates)
        gone = self.places(candidates)
        self.waiting = deque(each for each in self.waiting if row_of(each.row).key not in gone)

    def end(self) -> None:
        """Let go of the searches, which hold on to it."""
        for trail in self.trails:
            with suppress(Exception):  # of a search that somebody wrote, which has nobody left to tell
                trail.moves.close()
        self.trails.clear()
        self.waiting.clear()


def place_of(row: Row) -> Place:
    """Whose row it is."""
    assert isinstance(row.key, Place)
    return row.key


def row_of(waiting: Row | Lane) -> Row:
    """The row that waits."""
    return waiting if isinstance(waiting, Row) else waiting.rows[0].row


def first_noise(candidate: Candidate, shape: Sequence[int]) -> Tensor | None:
    """Unit noise that a candidate's decoder begins with; None: block 0 of its own seed's."""
    if not candidate.noise_path:
        return candidate.latents
    seeds = [*(before.seed for before in candidate.noise_path), candidate.seed]
    x = noise(seeds[:1], DECODER, 0, shape)[0]
    for before, seed in zip(candidate.noise_path, seeds[1:], strict=True):
        if before.steps == 0:
            x = turned(x, noise([seed], DECODER, 0, shape)[0], before.share)
    return x


def turned(x: Tensor, fresh: Tensor, share: float) -> Tensor:
    """Unit noise that is `share` fresh."""
    return (1 - share**2) ** 0.5 * x + share * fresh


@dataclass(frozen=True, eq=False)
class PromptField(Generic[R]):
    """What a search sees of one prompt; see `gen.search.Field`."""

    engine: Engine[R]
    flight: Flight[R]
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
        return self.engine._num_steps(self.flight.job)

    @property
    def scores(self) -> dict[int, float]:
        """CLIP's cosine of those that are painted."""
        painted = {index: self.flight.painted[index] for index in self.candidates if index in self.flight.painted}
        return scores_of(painted)

    @property
    def sharpness(self) -> float:
        """1 / CLIP's temperature."""
        assert self.engine.model.clip is not None, "a search is refused where there is no CLIP"
        return float(self.engine.model.clip.logit_scale.exp())

    def previews(self, candidates: Sequence[int]) -> list[float]:
        """CLIP's cosine of a cheap look at their latest clean estimates."""
        return self.engine._previewed(self.flight, self.known(candidates))

    def drop(self, candidates: Sequence[int]) -> None:
        """Give up candidates that are not painted."""
        self.engine._give_up(self.flight, self.known(candidates))

    def branch(self, source: int, targets: Sequence[int]) -> None:
        """Let targets go on from where the source has halted."""
        self.engine._branch(self.flight, source, self.known([source, *targets])[1:])

    def turn(self, source: int, targets: Sequence[int], share: float) -> None:
        """Let targets begin near where the source began."""
        self.engine._turn(self.flight, source, self.known([source, *targets])[1:], share)

    def seconds_left(self) -> float:
        """Of the budget."""
        return self.engine._seconds_left(self.flight)

    def among(self, candidates: Sequence[int]) -> PromptField[R]:
        """The same with these candidates alone."""
        return replace(self, candidates=self.known(candidates))

    def known(self, candidates: Sequence[int]) -> Sequence[int]:
        """These candidates, if a search may name them: its own, each once; else ValueError."""
        check_named(candidates, self.candidates)
        return candidates


def check_named(candidates: Sequence[int], own: Sequence[int]) -> None:
    """ValueError where a search names a candidate twice, or one that is not its own."""
    if len(set(candidates)) < len(candidates) or not set(candidates) <= set(own):
        raise ValueError(f"the search names candidates {list(candidates)}; give each once, of its own {list(own)}")


def only(candidate: int) -> Moves:
    """What is left of a search when its time is over before anything is painted."""
    yield Go([candidate])


def scores_of(painted: Mapping[int, Painted]) -> dict[int, float]:
    """The score of each candidate; here the device is waited for, once."""
    scored = {index: each.score for index, each in painted.items() if each.score is not None}
    return dict(zip(scored, torch.stack(list(scored.values())).tolist(), strict=True)) if scored else {}


# --- the engine --------------------------------------------------------------------------------------------------


class Engine(Generic[R]):
    """Requests over one model; see the module.

    It runs in the calling thread, tick by tick, or, once started (`with engine:`), in a thread of its own. Requests
    are let in whole, first come first served, for as long as the rows in flight do not fill a network call: it is full
    where memory is, or where more would hardly go faster for being asked together.
    """

    def __init__(
        self,
        model: Family,
        conclude: Conclude[R],
        *,
        max_rows: int | None = None,  # rows in flight at most; None: as memory allows
        buckets: Buckets | None = None,  # what is known of the memory that calls take; None: nothing yet
        clock: Callable[[], float] = monotonic,  # seconds, by which budgets are spent
    ) -> None:
        self.model = model
        self._conclude = conclude
        self._max_rows = max_rows
        self._clock = clock
        self._buckets = Buckets() if buckets is None else buckets
        self._table = Table()
        self._stages: dict[Stage, Rows] = {}  # an embedding goes on as a picture within a tick, so the prior is first
        if model.prior is not None:
            network, scaling = model.prior.asked(), model.prior.levels.scaling
            self._stages[PRIOR] = Rows(network, scaling, PRIOR, model.device, self._buckets)
        self._stages[DECODER] = Rows(
            model.call, model.levels.scaling, DECODER, model.device, self._buckets, partial(likeness, model)
        )
        self._flights: dict[int, Flight[R]] = {}  # those that have begun; the ticking thread's alone
        self._changed = threading.Condition()  # guards what follows
        self._queue: deque[Flight[R]] = deque()  # those that have not
        self._unsettled: dict[int, Flight[R]] = {}  # both
        self._numbers = count()
        self._is_closed = self._is_stopped = False
        self._thread: threading.Thread | None = None
        self._cancelled: deque[int] = deque()  # the numbers of requests whose future was cancelled

    def submit(
        self,
        request: Request | Job,
        *,
        callback: Callback | None = None,  # called after every step of its pictures, to look or to cancel
    ) -> Future[R]:
        """Ask for pictures, from any thread; they begin at the next tick.

        The future counts as pending until its pictures are there, so `cancel()` works to the last; it takes the rows
        out at the next tick. Raises ValueError for what this model cannot paint and RuntimeError once closed.
        """
        job = request.resolve(self.model.abilities) if isinstance(request, Request) else request
        for settings in {id(each.settings): each.settings for each in job.candidates}.values():
            self.model.levels.schedule(settings.sampler, settings.num_inference_steps)  # may refuse the sampler
        job.search.check(self._asked(job))
        deadline = None if job.budget is None else self._clock() + job.budget
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed; make another")
            flight: Flight[R] = Flight(next(self._numbers), job, callback, deadline)
            # holds the queue and not the engine, which a future that is kept would keep
            flight.future.add_done_callback(partial(_note_cancelled, self._cancelled, flight.number))
            self._queue.append(flight)
            self._unsettled[flight.number] = flight
            self._changed.notify_all()
        return flight.future

    @torch.no_grad()
    def tick(self) -> bool:
        """Take every row one step and answer what is done; False where nothing is left to do."""
        if self._thread not in (None, threading.current_thread()):
            raise RuntimeError("the engine runs in a thread of its own; submit, and wait for the future")
        self._let_go()
        for flight in list(self._flights.values()):
            self._mind_deadline(flight)
        self._let_in()
        for stage, rows in self._stages.items():
            self._step(stage, rows)
        self._decode()
        for flight in list(self._flights.values()):
            self._end(flight)
        return bool(self._flights or self._queue)

    # --- in its own thread ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run in a thread of its own until it is closed; the end of the interpreter cancels what is in flight."""
        if self._is_closed or self._thread is not None:
            raise RuntimeError("the engine has been started before; make another")
        self._thread = threading.Thread(target=self._work, name="unclip-engine", daemon=True)
        atexit.register(self._stop)
        self._thread.start()

    def close(self, *, cancel: bool = False) -> None:
        """Take no further requests and finish those in flight, or cancel them; every future is resolved then."""
        with self._changed:
            self._is_closed = True
            self._is_stopped = self._is_stopped or cancel
            self._changed.notify_all()
        if self._thread is None:
            self._work()
        elif self._thread is not threading.current_thread():
            self._thread.join()
            atexit.unregister(self._stop)

    def __enter__(self) -> Engine[R]:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    def _stop(self) -> None:
        self.close(cancel=True)

    def _work(self) -> None:
        """Tick while there is something to do, and wait while there is not."""
        error: BaseException | None = None
        try:
            while self._is_wanted():
                self.tick()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._abandon(error)

    def _is_wanted(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._unsettled))
            return bool(self._unsettled) and not self._is_stopped

    def _abandon(self, error: BaseException | None) -> None:
        """Resolve all that is left: with the error that ended the loop, or as cancelled."""
        with self._changed:
            self._is_closed = True
        for rows in self._stages.values():  # first, for an interrupted tick may have left them half way
            rows.lanes.clear()
        for flight in list(self._unsettled.values()):
            if error is None:
                flight.future.cancel()
            self._settle(flight, partial(flight.future.set_exception, error))

    # --- who comes and who goes ----------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Take out the requests whose future was cancelled."""
        while self._cancelled:
            flight = self._unsettled.get(self._cancelled.popleft())
            if flight is not None:
                self._settle(flight, lambda: None)

    def _let_in(self) -> None:
        """Let rows in, first come first served, while there is room."""
        waiting = [flight for flight in self._flights.values() if flight.waiting]
        while (room := self._room()) > 0:
            flight = waiting.pop(0) if waiting else self._begun()
            if flight is None:
                return
            while flight.waiting and room > 0:
                self._admit(flight, room)
                room = self._room()

    def _room(self) -> int:
        """How many rows may come in."""
        stages = self._stages.values()
        if sum(rows.filling for rows in stages) >= 1:
            return 0
        return UNBOUNDED if self._max_rows is None else self._max_rows - sum(len(rows.live) for rows in stages)

    def _begun(self) -> Flight[R] | None:
        """The next request with its texts encoded, one that fails at that passed over; None where there is none."""
        while True:
            with self._changed:
                if not self._queue:
                    return None
                flight = self._queue.popleft()
                self._flights[flight.number] = flight
            with self._alone(flight):
                self._begin(flight)
                return flight

    def _admit(self, flight: Flight[R], room: int) -> None:
        chosen = [flight.waiting.popleft() for _ in range(min(room, len(flight.waiting)))]
        with self._alone(flight):
            for stage, rows in self._stages.items():
                here = [row for where, row in chosen if where == stage]
                rows.admit([row for row in here if isinstance(row, Row)])
                rows.resume([lane for lane in here if isinstance(lane, Lane)])

    def _settle(self, flight: Flight[R], resolve: Callable[[], object]) -> None:
        """Take a request out, and resolve its future unless it was cancelled."""
        self._flights.pop(flight.number, None)
        with self._changed:
            del self._unsettled[flight.number]
            if flight in self._queue:
                self._queue.remove(flight)
        self._drop(flight.places(range(len(flight.candidates))))
        flight.end()
        if flight.future.set_running_or_notify_cancel():
            resolve()

    @contextmanager
    def _alone(self, flight: Flight[R]) -> Iterator[None]:
        """What goes wrong in here is this request's alone."""
        try:
            yield
        except Exception as error:
            self._fail(flight, error)

    def _fail(self, flight: Flight[R], error: Exception) -> None:
        self._settle(flight, partial(flight.future.set_exception, error))

    # --- rows ----------------------------------------------------------------------------------------------------

    def _begin(self, flight: Flight[R]) -> None:
        """Encode a request's texts and let its searches say what is painted first."""
        flight.candidates = list(flight.job.candidates)
        flight.told = list(self.model.tell(flight.candidates, self._table))
        flight.unspoken = {index for index, each in enumerate(flight.candidates) if each.settings.prior}
        n = flight.job.num_images_per_prompt
        for first in range(0, len(flight.candidates), n):
            prompt: PromptField[R] = PromptField(self, flight, range(first, first + n))
            search = flight.job.search
            moves = search(prompt) if flight.job.budget is None else in_rounds(search, prompt)
            flight.trails.append(Trail(prompt.candidates, moves))
        self._search(flight)

    def _rows(self, flight: Flight[R], candidates: Sequence[int]) -> Iterator[Waiting]:
        """The first row of each candidate: the prior's, or the decoder's."""
        asking = [index for index in candidates if index in flight.unspoken]
        if asking:
            assert self.model.prior is not None, "a request for a prior is refused where there is none"
            keys = [Place(flight.number, index) for index in asking]
            for row in self.model.prior.rows([flight.candidates[index] for index in asking], keys, self._table):
                yield Waiting(PRIOR, row)
        for index in candidates:
            if index not in flight.unspoken:
                yield Waiting(DECODER, self._decoder_row(flight, index))

    def _decoder_row(self, flight: Flight[R], index: int) -> Row:
        candidate, levels, told = flight.candidates[index], self.model.levels, flight.told[index]
        settings, draft_steps = candidate.settings, flight.goals[index].draft_steps
        shape = self.model.latent_shape(settings)
        return Row(
            key=Place(flight.number, index, draft_steps is not None),
            seed=candidate.seed,
            shape=shape,
            schedule=levels.schedule(settings.sampler, draft_steps or settings.num_inference_steps),
            sampler=settings.sampler,
            prompt=told[0],
            null=told[1],
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
            guide=settings.guide,
            thresholding=settings.dynamic_thresholding,
            clip_guidance_scale=settings.clip_guidance_scale,
            target=self._text(flight, index) if settings.clip_guidance_scale else None,
            options=levels.options(settings.sampler) | settings.sampler_options,
            start=first_noise(candidate, shape),
            past=tuple((before.seed, before.steps) for before in candidate.noise_path),
        )

    def _step(self, stage: Stage, rows: Rows) -> None:
        """One step of a stage's rows, and what follows from it for their requests."""
        tick = rows.tick()
        for failed in tick.failed:
            for flight, _ in self._by_request(failed.rows):
                self._fail(flight, failed.error)
        for taken in tick.taken:
            for flight, slots in self._by_request([one.row for one in taken.rows]):
                with self._alone(flight):
                    flight.take(stage, taken, slots)
        for flight, places in self._by_request([one.row for one in tick.finished]):
            with self._alone(flight):
                self._go_on(flight, stage, [tick.finished[place] for place in places])

    def _by_request(self, rows: Sequence[Row]) -> list[tuple[Flight[R], list[int]]]:
        """The requests that these rows belong to and that are still here, and which rows are theirs."""
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(place_of(row).request, []).append(place)
        return [(self._flights[number], found) for number, found in places.items() if number in self._flights]

    def _go_on(self, flight: Flight[R], stage: Stage, finished: Sequence[Finished]) -> None:
        """Where rows of a request go from a stage's end: from the prior to the decoder, from there to be decoded."""
        indices = [place_of(one.row).candidate for one in finished]
        if stage == PRIOR:
            assert self.model.prior is not None and isinstance(self.model, WithImage), "its rows are in flight"
            told = [flight.told[index] for index in indices]
            embeds = self.model.prior.embeds([one.x for one in finished]).unbind(0)
            candidates = [flight.candidates[index] for index in indices]
            prompts = self.model.show(candidates, [prompt for prompt, _ in told], embeds)
            for index, prompt, (_, null) in zip(indices, prompts, told, strict=True):
                flight.told[index] = (prompt, null)
            flight.unspoken.difference_update(indices)
            self._stages[DECODER].admit([self._decoder_row(flight, index) for index in indices])
            return
        for index, one in zip(indices, finished, strict=True):
            if place_of(one.row).is_draft:
                flight.estimates[index] = one.x
                del flight.goals[index]
            else:
                flight.latents[index] = one.x
                if not flight.wants_pixels:
                    flight.paint(index, Painted(one.x))

    # --- pictures ------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Decode and score what has finished, once it makes a whole chunk or a request waits for nothing else."""
        ready: dict[tuple[int, ...], list[tuple[Flight[R], int]]] = {}
        for flight in self._flights.values():
            for index, latents in flight.latents.items():
                ready.setdefault(tuple(latents.shape), []).append((flight, index))
        for shape, members in ready.items():
            here = [(flight, index) for flight, index in members if flight.number in self._flights]
            if len(here) >= DECODE_CHUNK or any(flight.is_through for flight, _ in here):
                self._decode_all(shape, here)

    def _decode_all(self, shape: tuple[int, ...], members: Sequence[tuple[Flight[R], int]]) -> None:
        bucket, waiting = self._buckets.of("decode", shape, self.model.device), deque(members)
        while waiting:
            size = min(len(waiting), DECODE_CHUNK, bucket.size)
            chunk = [waiting.popleft() for _ in range(size)]
            try:
                if bucket.wants_probe(size):
                    latents = [flight.latents[index] for flight, index in chunk[:PROBE]]
                    bucket.probe(partial(self.model.decode, torch.stack(latents)))
                self._decode_chunk(chunk)
            except Exception as error:
                if not is_out_of_memory(error):
                    self._find_fault(chunk, error)
                elif bucket.halve(size):
                    waiting.extendleft(reversed(chunk))
                else:
                    self._find_fault(chunk, bucket.overflow(error))
            waiting = deque((flight, index) for flight, index in waiting if flight.number in self._flights)

    def _find_fault(self, chunk: Sequence[tuple[Flight[R], int]], error: Exception) -> None:
        """A chunk failed: the request it was of, or where there are several, those whose own pictures fail alone."""
        shares: dict[int, list[tuple[Flight[R], int]]] = {}
        for flight, index in chunk:
            shares.setdefault(flight.number, []).append((flight, index))
        for share in shares.values():
            with self._alone(share[0][0]):
                if len(shares) == 1:
                    raise error
                self._decode_chunk(share)

    def _decode_chunk(self, chunk: Sequence[tuple[Flight[R], int]]) -> None:
        """Paint and score these latents; all of them or, where something raises, none."""
        latents = [flight.latents[index] for flight, index in chunk]
        pixels = self.model.decode(torch.stack(latents))
        scores: dict[int, Tensor] = {}
        embeddings: dict[int, Tensor] = {}
        ranked = [place for place, (flight, _) in enumerate(chunk) if flight.job.rank]
        if ranked:
            texts = torch.stack([self._text(*chunk[place]) for place in ranked])
            seen = self._seen(torch.stack([pixels[place] for place in ranked]))
            embeddings = dict(zip(ranked, seen.unbind(0), strict=True))
            scores = dict(zip(ranked, cosine(seen, texts).unbind(0), strict=True))
        for place, (flight, index) in enumerate(chunk):
            flight.paint(index, Painted(latents[place], pixels[place], scores.get(place), embeddings.get(place)))

    def _seen(self, pixels: Tensor) -> Tensor:
        """CLIP's embedding (B, E) of pictures (B, 3, H, W); they are read as 8-bit, as a file holds them."""
        assert self.model.clip is not None, "a ranking is refused where there is no CLIP"
        return self.model.clip.image((pixels * 255).round() / 255)

    def _text(self, flight: Flight[R], index: int) -> Tensor:
        """CLIP's embedding (E,) of a candidate's prompt; those of a request are read together, once."""
        assert self.model.clip is not None, "a ranking is refused where there is no CLIP"
        if not flight.texts:
            texts = list(dict.fromkeys(candidate.prompt for candidate in flight.job.candidates))
            flight.texts = dict(zip(texts, self.model.clip.text(texts).embedding.unbind(0), strict=True))
        return flight.texts[flight.job.candidates[index].prompt]

    # --- which candidates go on ----------------------------------------------------------------------------------

    def _asked(self, job: Job) -> Asked:
        """What a search is asked to work on."""
        first = job.candidates[0]
        sampler = first.settings.sampler
        options = self.model.levels.options(sampler) | first.settings.sampler_options
        adds = SAMPLERS[sampler].noise
        return Asked(
            num_candidates=job.num_images_per_prompt,
            keep=job.keep,
            is_noisy=any(options.get(name, SAMPLERS[sampler].defaults[name]) > 0 for name in adds),
            has_latents=first.latents is not None,
        )

    def _num_steps(self, job: Job) -> int:
        """Steps of the decoder from the noise to a picture, which all of a job take alike."""
        settings = job.candidates[0].settings
        return self.model.levels.schedule(settings.sampler, settings.num_inference_steps).num_steps

    def _search(self, flight: Flight[R]) -> None:
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
                    self._give_up(flight, [index for index in unpainted if index not in flight.given_up])
                else:
                    trail.awaited = list(move.candidates)
                    self._set_going(flight, trail, move)
        self._halt(flight, flight.halting)

    def _set_going(self, flight: Flight[R], trail: Trail, move: Move) -> None:
        """Give candidates a goal; those that are in no batch wait to be let in."""
        goal = Goal(until=move.until) if isinstance(move, Go) else Goal(draft_steps=move.num_inference_steps)
        check_named(move.candidates, trail.candidates)
        num_steps = self._num_steps(flight.job)
        if goal.until is not None and goal.until >= num_steps:
            told = f"the search takes candidates to step {goal.until} of {num_steps}"
            raise ValueError(f"{told}; leave until out where they are to be painted")
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
        flight.waiting.extend(self._rows(flight, [index for index in move.candidates if index not in placed]))
        for index in move.candidates:
            flight.halting.discard(index)
            if index in flight.halted:
                flight.waiting.append(Waiting(DECODER, flight.halted.pop(index)))

    def _give_up(self, flight: Flight[R], candidates: Collection[int]) -> None:
        if wrong := [index for index in candidates if index in flight.given_up or index in flight.painted]:
            raise ValueError(f"the search gives up candidates {wrong}, which are given up or painted")
        flight.give_up(candidates)
        self._drop(flight.places(candidates))

    def _drop(self, places: set[Hashable]) -> None:
        for rows in self._stages.values():
            rows.drop(places)

    def _halt(self, flight: Flight[R], candidates: Collection[int]) -> None:
        """Take rows that stand still out of their batch."""
        if candidates:
            halted = self._stages[DECODER].halt(flight.places(candidates))
            flight.halted |= {place_of(row_of(lane)).candidate: lane for lane in halted.values()}
            flight.halting.difference_update(list(candidates))

    def _mind_deadline(self, flight: Flight[R]) -> None:
        """When a budget is spent: give up what is not painted, but of a prompt without any picture the nearest one."""
        if flight.deadline is None or self._clock() < flight.deadline:
            return
        flight.deadline = None
        with self._alone(flight):
            for trail in flight.trails:
                if not trail.is_over:
                    self._hurry(flight, trail)
            self._search(flight)

    def _hurry(self, flight: Flight[R], trail: Trail) -> None:
        trail.moves.close()
        trail.awaited = ()
        left = [index for index in trail.candidates if index not in flight.given_up]
        kept = [index for index in left if index in flight.painted]
        if not kept:
            nearest = max(left, key=lambda index: (index in flight.latents, flight.taken.get(index, -1), -index))
            self._stop_draft(flight, nearest)
            kept, trail.moves = [nearest], only(nearest)
        self._give_up(flight, [index for index in left if index not in kept])

    def _stop_draft(self, flight: Flight[R], index: int) -> None:
        goal = flight.goals.get(index)
        if goal is not None and goal.draft_steps and index not in flight.unspoken:
            del flight.goals[index]
            place = Place(flight.number, index, is_draft=True)
            flight.waiting = deque(each for each in flight.waiting if row_of(each.row).key != place)
            self._drop({place})

    # --- what a search asks of its prompt --------------------------------------------------------------------------

    def _previewed(self, flight: Flight[R], candidates: Sequence[int]) -> list[float]:
        if unseen := [index for index in candidates if index not in flight.estimates]:
            raise ValueError(f"the search looks at candidates {unseen}, which have not begun or are painted")
        scores = []
        for start in range(0, len(candidates), DECODE_CHUNK):
            chunk = candidates[start : start + DECODE_CHUNK]
            latents = torch.stack([flight.estimates[index] for index in chunk])
            if self.model.is_small(flight.candidates[chunk[0]].settings):
                pixels = self.model.decode(latents)
                flight.account.decodes += len(chunk)
            else:
                pixels = self.model.preview(latents)
                flight.account.previews += len(chunk)
            texts = torch.stack([self._text(flight, index) for index in chunk])
            scores.append(cosine(self._seen(pixels), texts))
            flight.account.scores += len(chunk)
        return [] if not scores else torch.cat(scores).tolist()

    def _branch(self, flight: Flight[R], source: int, targets: Sequence[int]) -> None:
        self._halt(flight, flight.halting & {source, *targets})
        gone = flight.given_up | flight.painted.keys()
        if source not in flight.halted or any(index in flight.goals or index in gone for index in targets):
            raise ValueError(f"the search branches candidate {source} to {list(targets)}, which have not all halted")
        lane, origin = flight.halted[source], flight.candidates[source]
        path = (*origin.noise_path, Before(origin.seed, flight.taken[source]))
        for index in targets:
            candidate = replace(flight.candidates[index], noise_path=path)
            place = Place(flight.number, index)
            flight.candidates[index] = candidate
            flight.halted[index] = self._stages[DECODER].branch(lane, place, candidate.seed)
            flight.told[index], flight.estimates[index] = flight.told[source], flight.estimates[source]
            flight.taken[index] = flight.taken[source]
            flight.unspoken.discard(index)

    def _turn(self, flight: Flight[R], source: int, targets: Sequence[int], share: float) -> None:
        begun = flight.goals.keys() | flight.taken.keys() | flight.given_up | flight.painted.keys()
        if source in flight.unspoken or begun & set(targets):
            told = f"the search turns candidates {list(targets)} towards {source}"
            raise ValueError(f"{told}: of these some have begun or are given up, or its prior has not spoken")
        origin = flight.candidates[source]
        if origin.latents is not None:
            raise ValueError("the search turns noise that was handed in; leave latents out")
        path = (*origin.noise_path, Before(origin.seed, 0, share))
        for index in targets:
            flight.candidates[index] = replace(flight.candidates[index], noise_path=path)
            flight.told[index] = flight.told[source]
            flight.unspoken.discard(index)

    def _seconds_left(self, flight: Flight[R]) -> float:
        if flight.job.budget is None:
            return math.inf
        return 0.0 if flight.deadline is None else flight.deadline - self._clock()

    # --- answers -------------------------------------------------------------------------------------------------

    def _end(self, flight: Flight[R]) -> None:
        """Ask a request's searches, and answer the request if they are over."""
        with self._alone(flight):
            self._search(flight)
            if flight.is_done:
                job = replace(flight.job, candidates=tuple(flight.candidates))
                answer = self._conclude(job, flight.painted, flight.account)
                self._settle(flight, partial(flight.future.set_result, answer))


def likeness(model: Family, x0: Tensor, *, target: Tensor) -> Tensor:
    """CLIP's cosine (B,) of estimated latents with their texts (B, E), through which a gradient is taken."""
    assert model.clip is not None, "clip_guidance_scale is refused where there is no CLIP"
    return cosine(model.clip.image(model.decode(x0), rounded=False), target)


def _note_cancelled(cancelled: deque[int], number: int, future: Future[R]) -> None:
    if future.cancelled():
        cancelled.append(number)
