"""Requests in flight over one model: submitted from any thread, painted together by one loop, answered one by one.

An `Engine` turns requests into rows of the prior and of the decoder, ticks both, decodes and scores what has finished
while other rows go on, and resolves a request's future as soon as its own candidates are there. Requests share every
network call and nothing else: one that fails, is cancelled or gives candidates up takes its rows along, and the others
do not notice. It knows what every request is at, and neither samplers nor networks nor what an answer looks like.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from clip_core.clip import CLIP
from clip_core.score import cosine
from gen.bucket import PROBE, UNBOUNDED, Buckets, is_out_of_memory
from gen.conditioning import Condition, Conditions, Table, Told
from gen.prior import STAGE as PRIOR
from gen.prior import Prior
from gen.request import Abilities, Candidate, Job, Request, Settings
from gen.rows import Finished, Row, Rows, Taken
from gen.scheduler import NoiseLevels
from gen.search import Rule, Stage, Standing

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
    decodes: int = 0
    scores: int = 0


@dataclass(frozen=True, eq=False)
class Painted:
    """A candidate's end, on the device."""

    latents: Tensor  # (C, h, w)
    pixels: Tensor | None = None  # (3, H, W) in [0, 1]; None: nobody asked for them
    score: Tensor | None = None  # (); None: not ranked


Conclude = Callable[[Job, Mapping[int, Painted], Account], R]
"""conclude(job, its candidates that were not given up, by their place in drawing order, account) -> the answer"""


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

    def show(
        self, candidates: Sequence[Candidate], told: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """The same with an image embedding (E,) beside it."""

    def call(self, x: Tensor, timestep: Tensor, told: Conditions) -> Tensor:
        """The decoder's network."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""


# --- a request in flight -----------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The key of an engine's rows."""

    request: int
    candidate: int


@dataclass(eq=False)
class Flight(Generic[R]):
    """A request in flight: what it waits for, and what it has so far."""

    number: int
    job: Job
    callback: Callback | None
    rule: Rule | None
    future: Future[R] = field(default_factory=Future)
    waiting: deque[tuple[Stage, Row]] = field(default_factory=deque)  # rows to be let in, and where
    told: dict[int, Told] = field(default_factory=dict)  # of the candidates in the prior
    standing: dict[int, Standing] = field(default_factory=dict)  # of the candidates not given up
    latents: dict[int, Tensor] = field(default_factory=dict)  # finished, to be decoded
    painted: dict[int, Painted] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)  # CLIP's embedding (E,) of each prompt, once asked for
    account: Account = field(default_factory=Account)

    def __post_init__(self) -> None:
        self.standing = {index: Standing(index, each.seed) for index, each in enumerate(self.job.candidates)}

    @property
    def is_through(self) -> bool:
        """Whether none of its candidates has a step to take."""
        return len(self.painted) + len(self.latents) == len(self.standing)

    @property
    def is_painted(self) -> bool:
        """Whether all its candidates are at their end."""
        return len(self.painted) == len(self.standing)

    @property
    def wants_pixels(self) -> bool:
        """Whether anybody looks at its pictures."""
        return self.job.rank or self.job.output_type != "latent"

    def places(self, candidates: Collection[int]) -> set[Hashable]:
        """The keys of these candidates' rows."""
        return {Place(self.number, candidate) for candidate in candidates}

    def take(self, stage: Stage, taken: Taken, slots: Sequence[int]) -> None:
        """Note a step of its rows, which are at these slots, and let the callback look."""
        rows = [taken.rows[slot] for slot in slots]
        self.account.evaluations[stage] += sum(taken.evaluations[slot] for slot in slots)
        if self.rule is not None:
            for slot, one in zip(slots, rows, strict=True):
                index = place_of(one.row).candidate
                before = self.standing[index]
                self.standing[index] = Standing(index, before.seed, stage, one.index, taken.x0[slot])
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

    def paint(self, index: int, painted: Painted) -> None:
        """Note a candidate's end."""
        del self.latents[index]
        self.painted[index] = painted
        self.account.decodes += painted.pixels is not None
        self.account.scores += painted.score is not None
        self.standing[index] = replace(self.standing[index], stage="painted", score=painted.score)

    def give_up(self, candidates: Collection[int]) -> None:
        """Forget these candidates."""
        for index in candidates:
            for known in (self.standing, self.told, self.latents, self.painted):
                known.pop(index, None)
        self.waiting = deque(each for each in self.waiting if place_of(each[1]).candidate in self.standing)


def place_of(row: Row) -> Place:
    """Whose row it is."""
    assert isinstance(row.key, Place)
    return row.key


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
    ) -> None:
        self.model = model
        self._conclude = conclude
        self._max_rows = max_rows
        self._buckets = Buckets() if buckets is None else buckets
        self._table = Table()
        self._stages: dict[Stage, Rows] = {}  # an embedding goes on as a picture within a tick, so the prior is first
        if model.prior is not None:
            network, scaling = model.prior.asked(), model.prior.levels.scaling
            self._stages[PRIOR] = Rows(network, scaling, PRIOR, model.device, self._buckets)
        self._stages[DECODER] = Rows(model.call, model.levels.scaling, DECODER, model.device, self._buckets)
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
        rule: Rule | None = None,  # asked after every tick which of its candidates to give up
    ) -> Future[R]:
        """Ask for pictures, from any thread; they begin at the next tick.

        The future counts as pending until its pictures are there, so `cancel()` works to the last; it takes the rows
        out at the next tick. Raises ValueError for what this model cannot paint and RuntimeError once closed.
        """
        job = request.resolve(self.model.abilities) if isinstance(request, Request) else request
        for settings in {id(each.settings): each.settings for each in job.candidates}.values():
            self.model.levels.schedule(settings.sampler, settings.num_inference_steps)  # may refuse the sampler
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed; make another")
            flight: Flight[R] = Flight(next(self._numbers), job, callback, rule)
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
                flight.waiting = deque(self._rows(flight))
                return flight

    def _admit(self, flight: Flight[R], room: int) -> None:
        chosen = [flight.waiting.popleft() for _ in range(min(room, len(flight.waiting)))]
        with self._alone(flight):
            for stage, rows in self._stages.items():
                rows.admit([row for where, row in chosen if where == stage])

    def _settle(self, flight: Flight[R], resolve: Callable[[], object]) -> None:
        """Take a request out, and resolve its future unless it was cancelled."""
        self._flights.pop(flight.number, None)
        with self._changed:
            del self._unsettled[flight.number]
            if flight in self._queue:
                self._queue.remove(flight)
        flight.waiting.clear()
        for rows in self._stages.values():
            rows.drop(flight.places(flight.standing))
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

    def _rows(self, flight: Flight[R]) -> list[tuple[Stage, Row]]:
        """The first row of each candidate, and whose stage it belongs to: the prior's or the decoder's."""
        candidates = flight.job.candidates
        told = self.model.tell(candidates, self._table)
        asking = [index for index, candidate in enumerate(candidates) if candidate.settings.prior]
        flight.told = {index: told[index] for index in asking}
        rows: dict[int, tuple[Stage, Row]] = {
            index: (DECODER, self._decoder_row(flight, index, each))
            for index, each in enumerate(told)
            if index not in flight.told
        }
        if asking:
            assert self.model.prior is not None, "a request for a prior is refused where there is none"
            keys = [Place(flight.number, index) for index in asking]
            begun = self.model.prior.rows([candidates[index] for index in asking], keys, self._table)
            rows |= {index: (PRIOR, row) for index, row in zip(asking, begun, strict=True)}
        return [rows[index] for index in range(len(candidates))]

    def _decoder_row(self, flight: Flight[R], index: int, told: Told) -> Row:
        candidate, levels = flight.job.candidates[index], self.model.levels
        settings = candidate.settings
        return Row(
            key=Place(flight.number, index),
            seed=candidate.seed,
            shape=self.model.latent_shape(settings),
            schedule=levels.schedule(settings.sampler, settings.num_inference_steps),
            sampler=settings.sampler,
            prompt=told[0],
            null=told[1],
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
            guide=settings.guide,
            thresholding=settings.dynamic_thresholding,
            options=levels.options(settings.sampler) | settings.sampler_options,
            start=candidate.latents,
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
            assert self.model.prior is not None, "its rows are in flight"
            told = [flight.told.pop(index) for index in indices]
            embeds = self.model.prior.embeds([one.x for one in finished]).unbind(0)
            candidates = [flight.job.candidates[index] for index in indices]
            prompts = self.model.show(candidates, [prompt for prompt, _ in told], embeds)
            pairs = [(prompt, null) for prompt, (_, null) in zip(prompts, told, strict=True)]
            self._stages[DECODER].admit(
                [self._decoder_row(flight, index, pair) for index, pair in zip(indices, pairs, strict=True)]
            )
            return
        flight.latents |= {index: one.x for index, one in zip(indices, finished, strict=True)}
        if not flight.wants_pixels:
            for index in indices:
                flight.paint(index, Painted(flight.latents[index]))

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
        ranked = [place for place, (flight, _) in enumerate(chunk) if flight.job.rank]
        if ranked:
            texts = torch.stack([self._text(*chunk[place]) for place in ranked])
            scores = dict(zip(ranked, self._scores([pixels[place] for place in ranked], texts), strict=True))
        for place, (flight, index) in enumerate(chunk):
            flight.paint(index, Painted(latents[place], pixels[place], scores.get(place)))

    def _scores(self, pixels: Sequence[Tensor], texts: Tensor) -> Sequence[Tensor]:
        """CLIP's cosine () of each picture with its text (B, E); it is read as 8-bit, as a file holds it."""
        assert self.model.clip is not None, "a ranking is refused where there is no CLIP"
        rounded = (torch.stack(list(pixels)) * 255).round() / 255
        return cosine(self.model.clip.image(rounded), texts).unbind(0)

    def _text(self, flight: Flight[R], index: int) -> Tensor:
        """CLIP's embedding (E,) of a candidate's prompt; those of a request are read together, once."""
        assert self.model.clip is not None, "a ranking is refused where there is no CLIP"
        if not flight.texts:
            texts = list(dict.fromkeys(candidate.prompt for candidate in flight.job.candidates))
            flight.texts = dict(zip(texts, self.model.clip.text(texts).embedding.unbind(0), strict=True))
        return flight.texts[flight.job.candidates[index].prompt]

    # --- answers -------------------------------------------------------------------------------------------------

    def _end(self, flight: Flight[R]) -> None:
        """Ask a request's rule, and answer the request if it is done."""
        with self._alone(flight):
            if flight.rule is not None:
                self._give_up(flight, set(flight.rule(list(flight.standing.values()))))
            if flight.is_painted:
                answer = self._conclude(flight.job, flight.painted, flight.account)
                self._settle(flight, partial(flight.future.set_result, answer))

    def _give_up(self, flight: Flight[R], candidates: set[int]) -> None:
        if unknown := candidates - flight.standing.keys():
            raise ValueError(f"the rule gave up candidates {sorted(unknown)}, which are not in flight")
        if len(candidates) == len(flight.standing):
            raise ValueError("the rule gave up every candidate; one at least has to be left")
        flight.give_up(candidates)
        for rows in self._stages.values():
            rows.drop(flight.places(candidates))


def _note_cancelled(cancelled: deque[int], number: int, future: Future[R]) -> None:
    if future.cancelled():
        cancelled.append(number)
