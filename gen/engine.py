"""Requests in flight over one model: submitted from any thread, painted together by one loop, answered one by one.

An `Engine` ticks the rows of the prior and of the decoder, lets what has finished be decoded and scored while other
rows go on, and resolves a request's future as soon as its own candidates are there. Requests share every network call
and nothing else: one that fails, is cancelled or gives candidates up takes its rows along, and the others do not
notice. It knows who comes and who goes; rows are `gen.stages`', pictures `gen.decode_queue`'s and searches
`gen.search_runner`'s.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from time import monotonic
from types import TracebackType
from typing import Generic, TypeVar

import torch

from gen.bucket import Buckets, is_out_of_memory
from gen.checks import check_callback
from gen.conditioning import Condition
from gen.decode_queue import DecodeQueue
from gen.edit import schedule_of
from gen.flight import Account, Callback, Flight, Painted, Stage, row_key
from gen.model import Family
from gen.request import Job, Request
from gen.resolve import resolve
from gen.row import Row
from gen.rows import Failed, Rows, Tick
from gen.search_runner import SearchRunner
from gen.stages import Stages
from gen.tf32 import without_tf32

R = TypeVar("R")

Conclude = Callable[[Job, Mapping[int, Painted], Account], R]
"""conclude(job, those of its candidates that are painted, by their place in drawing order, account) -> the answer

The job's candidates are as they were painted: with the noise path that the search has made."""


class Engine(Generic[R]):
    """Requests over one model; see the module.

    It runs in the calling thread, tick by tick, or, once started (`with engine:`), in a thread of its own. Requests
    begin first come first served, for as long as the rows in flight do not fill a network call: it is full where memory
    is, or where more would hardly go faster for being asked together. Of one that has begun, rows come in as memory
    allows.
    """

    def __init__(
        self,
        model: Family,
        conclude: Conclude[R],
        *,
        max_rows: int | None = None,  # rows in flight at most; None: as memory allows
        buckets: Buckets | None = None,  # what is known of the memory that calls take; None: nothing yet
        clock: Callable[[], float] = monotonic,  # seconds, by which budgets are spent
        check: Callable[[Job], None] | None = None,  # refuses what would not fit, asked while nothing is in flight
        turn: AbstractContextManager[object] | None = None,  # held in a tick: who else asks the model's networks waits
    ) -> None:
        self.model = model
        self._check = check
        self._turn = nullcontext() if turn is None else turn
        self._conclude = conclude
        self._max_rows = max_rows
        self._clock = clock
        buckets = Buckets() if buckets is None else buckets
        self._relief = buckets.relief
        self._decode_queue = DecodeQueue(model, buckets)
        self._stages = Stages(model, buckets, self._decode_queue)
        self._search_runner = SearchRunner(model, self._stages, self._decode_queue, clock)
        self._flights: dict[int, Flight[R]] = {}  # those that have begun; the ticking thread's alone
        self._changed = threading.Condition()  # guards what follows
        # Those that have not, by their pictures' shape, each no sooner than those before it; no shape has none.
        self._queue: dict[tuple[int, ...], deque[Flight[R]]] = {}
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
        out at the next tick. Raises ValueError for what this model cannot paint, TypeError for what is no request and
        RuntimeError once closed.
        """
        check_callback(callback)
        job = self.check(request)
        # What is free says little once a request has begun, as in a thread of its own any but the first may have.
        if self._check is not None and not (self._flights if self._thread is None else self._unsettled):
            self._check(job)
        deadline = None if job.budget is None else self._clock() + job.budget
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed; make another")
            flight: Flight[R] = Flight(next(self._numbers), job, callback, deadline)
            # holds the queue and not the engine, which a future that is kept would keep
            flight.future.add_done_callback(partial(_note_cancelled, self._cancelled, flight.number))
            self._queue.setdefault(self._stages.shape_of(flight), deque()).append(flight)
            self._unsettled[flight.number] = flight
            self._changed.notify_all()
        return flight.future

    def check(self, request: Request | Job) -> Job:
        """What `submit` would paint; the same errors."""
        if not isinstance(request, Request | Job):
            raise TypeError(f"request is of type {type(request).__name__}; give a Request")
        job = resolve(request, self.model.abilities) if isinstance(request, Request) else request
        for settings in {id(each.settings): each.settings for each in job.candidates}.values():
            schedule_of(self.model.levels, settings)  # may refuse the sampler
        job.search.check(self._search_runner.asked(job))
        return job

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        with self._changed:
            return sum(map(len, self._queue.values()))

    def so_far(self, future: Future[R]) -> Callable[[], R] | None:
        """What makes the answer to a request of what is painted of it by now; None: nothing is.

        What has taken all of its steps and waits to be decoded is painted: it is decoded when the answer is made. Not
        while the engine runs in a thread. What is given works once the engine is closed, too.
        """
        for flight in self._unsettled.values():
            if flight.future is future:
                return partial(self._answer_so_far, flight) if flight.painted or flight.latents else None
        is_answered = future.done() and not future.cancelled() and future.exception() is None
        return future.result if is_answered else None

    @torch.no_grad()
    def tick(self) -> bool:
        """Take every row one step and answer what is done; False where nothing is left to do."""
        if self._thread not in (None, threading.current_thread()):
            raise RuntimeError("the engine runs in a thread of its own; submit, and wait for the future")
        with self._turn, without_tf32(self.model.device):
            return self._tick()

    def _tick(self) -> bool:
        self._let_go()
        for flight in list(self._flights.values()):
            if self._search_runner.is_late(flight):
                with self._alone(flight):
                    self._search_runner.hurry(flight)
        self._let_in()
        for stage, rows in self._stages.rows.items():
            self._step(stage, rows)
        self._decode_queue.decode_ready(self._flights, self._fail)
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
        for rows in self._stages.rows.values():  # first, for an interrupted tick may have left them half way
            rows.clear()
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
        """Let rows in while there is room for them, first come first served among pictures of a size."""
        for flight in list(self._flights.values()):
            self._admit(flight)
        while chosen := self._next():
            read = self._encode_prompts(chosen)  # noqa: F841 - held until rows refer to it
            for flight in chosen:
                if flight.number in self._flights:  # or its texts could not be encoded
                    with self._alone(flight):
                        self._search_runner.begin(flight)
                    self._admit(flight)

    def _next(self) -> list[Flight[R]]:
        """The requests at the front of the queue that there is room for, begun."""
        chosen = list[Flight[R]]()
        with self._changed:
            waiting = {self._stages.shape_of(each) for each in self._flights.values() if each.waiting}
            shapes = self._queue.keys() - waiting  # those that there may be room for
            while shapes:
                shape = min(shapes, key=lambda each: self._queue[each][0].number)
                flight = self._queue[shape][0]
                if self._stages.has_room(flight, chosen, self._max_rows):
                    chosen.append(flight)
                    self._unqueue(flight)
                    shapes &= self._queue.keys()
                else:
                    shapes.remove(shape)
            self._flights |= {flight.number: flight for flight in chosen}
        for flight in chosen:
            flight.candidates = list(flight.job.candidates)
            flight.awaiting_prior = {index for index, each in enumerate(flight.candidates) if each.settings.prior}
        return chosen

    def _unqueue(self, flight: Flight[R]) -> None:
        """Take a request out of the queue, if it is there: Ctrl-C may have come between that and its beginning."""
        shape = self._stages.shape_of(flight)
        waiting = self._queue.get(shape, deque())
        with suppress(ValueError):
            waiting.remove(flight)  # found at once, where it is the first
        if not waiting:
            self._queue.pop(shape, None)

    def _encode_prompts(self, flights: Sequence[Flight[R]]) -> list[Condition]:
        """Encode the texts of requests together, or where that fails one by one, to find whom it fails for.

        Where memory ran out for one alone, others make room if they can.
        """
        try:
            return self._stages.encode_prompts(flights)
        except Exception as raised:
            error = raised
            if self._relief is not None and is_out_of_memory(error):
                error.__traceback__ = None  # its frames hold what had been made
        if len(flights) > 1:
            del error
            return [condition for flight in flights for condition in self._encode_prompts([flight])]
        if self._relief is not None and is_out_of_memory(error) and self._relief():
            try:
                return self._stages.encode_prompts(flights)
            except Exception as again:
                error = again
        self._fail(flights[0], error)
        return []

    def _admit(self, flight: Flight[R]) -> None:
        """Let rows of a request in that wait, in their order."""
        while flight.waiting and (room := self._stages.room(flight, self._max_rows)) > 0:
            stage = flight.waiting[0].stage
            same = next((place for place, one in enumerate(flight.waiting) if one.stage != stage), len(flight.waiting))
            chosen = [flight.waiting.popleft() for _ in range(min(room, same))]
            with self._alone(flight):
                self._stages.admit(chosen)

    def _settle(self, flight: Flight[R], answer: Callable[[], object]) -> None:
        """Take a request out, and resolve its future unless it was cancelled."""
        has_begun = self._flights.pop(flight.number, None) is not None
        with self._changed:
            del self._unsettled[flight.number]
            if not has_begun:
                self._unqueue(flight)
        self._stages.drop(flight.row_keys(range(len(flight.candidates))))
        flight.end()
        if flight.future.set_running_or_notify_cancel():
            answer()

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

    def _step(self, stage: Stage, rows: Rows) -> None:
        """One step of a stage's rows, and what follows from it for their requests."""
        try:
            tick = rows.tick()
        except Exception as error:  # nobody's in particular, and nobody knows how the rows stand
            tick = Tick(failed=[Failed(rows.clear(), error)])
        for failed in tick.failed:
            for flight, _ in self._by_request(failed.rows):
                self._fail(flight, failed.error)
        for taken in tick.taken:
            for flight, slots in self._by_request([one.row for one in taken.rows]):
                with self._alone(flight):
                    flight.take(stage, taken, slots)
        for flight, places in self._by_request([one.row for one in tick.finished]):
            with self._alone(flight):
                self._stages.go_on(flight, stage, [tick.finished[place] for place in places])

    def _by_request(self, rows: Sequence[Row]) -> list[tuple[Flight[R], list[int]]]:
        """The requests that these rows belong to and that are still here, and which rows are theirs."""
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row_key(row).request, []).append(place)
        return [(self._flights[number], found) for number, found in places.items() if number in self._flights]

    # --- answers -------------------------------------------------------------------------------------------------

    def _end(self, flight: Flight[R]) -> None:
        """Ask a request's searches, and answer the request if they are over."""
        with self._alone(flight):
            self._search_runner.ask(flight)
            if flight.is_done:
                self._settle(flight, partial(flight.future.set_result, self._concluding(flight)()))

    @torch.no_grad()
    def _answer_so_far(self, flight: Flight[R]) -> R:
        with self._turn, without_tf32(self.model.device):
            self._decode_queue.finish(flight)
        return self._concluding(flight)()

    def _concluding(self, flight: Flight[R]) -> Callable[[], R]:
        job = replace(flight.job, candidates=tuple(flight.candidates))
        return partial(self._conclude, job, flight.painted, flight.account)


def _note_cancelled(cancelled: deque[int], number: int, future: Future[R]) -> None:
    if future.cancelled():
        cancelled.append(number)
