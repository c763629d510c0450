"""How many evaluations a network is asked at once, measured, so that nobody picks a micro-batch.

A `Bucket` belongs to one network and one shape. A small call is measured first; from then on its size is what the
memory that is free just now has room for, and half of what was asked when memory ran out all the same, until that has
passed. Every call is timed, which tells from how many evaluations on a larger call is hardly faster. It knows neither
networks nor rows.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gen.memory import free_memory

logger = logging.getLogger(__name__)

PROBE = 2  # evaluations that are measured before more are asked: what guidance makes of one picture
# The share of free memory that a call may take. CUDA's allocator leaves gaps; on the CPU what kernels take for
# themselves is not measured, and other programs want some too.
SHARE = {"cuda": 0.8, "cpu": 0.5}
UNBOUNDED = sys.maxsize
HARDLY = 0.9  # of the seconds for an evaluation: what twice as many must fall below to be worth their while
APART = 1.25  # times as many evaluations, from where on two calls tell what twice as many would give
FEW = 128  # evaluations that are let into flight wherever memory allows, before it is known how many go fast
SURE = 5  # calls of a size that were timed before it is compared; a busy machine makes some of them slow
# Steps that come before twice as many are asked again where memory has run out: at first, and at most, for each time
# that twice as many were too many again doubles them.
PATIENCE, MOST_PATIENCE = 64, 4096

T = TypeVar("T")
# What allocators say that have no exception of their own: the CPU's, cuBLAS's and cuDNN's, and the driver's.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory")

_MEASURING: ContextVar[bool] = ContextVar("measuring", default=False)

Mark = float | torch.cuda.Event
"""A moment: of the host's clock, or on CUDA one that the device reaches later"""


@dataclass(frozen=True)
class Pace:
    """How fast calls of about one size are."""

    calls: int = 0
    seconds: float = math.inf  # for an evaluation, in the call that took least for each
    count: int = 0  # evaluations of that call


@dataclass(eq=False)
class Bucket:
    """The most evaluations of one shape to ask at once; engines in several threads may ask the same."""

    name: str  # for the log
    device: torch.device
    size: int = UNBOUNDED  # a power of two once it is known, so that it does not follow every change of what is free
    cost: float | None = None  # bytes of one evaluation; None: not measured
    ceiling: int = UNBOUNDED  # lower once memory has run out, until it has not for a while
    paces: dict[int, Pace] = field(default_factory=dict)  # of calls of 2^(k-1) to 2^k - 1 evaluations, by k
    relief: Callable[[], bool] | None = None  # has others leave the device's memory; whether any did; None: nobody can
    _is_relieved: bool = False  # since something last came of its calls
    _calm: int = 0  # how often something has come of its calls since the ceiling last changed
    _patience: int = PATIENCE  # how often it has to before the ceiling is raised
    _has_risen: bool = False  # whether it was, since memory last ran out
    _running: deque[tuple[int, Mark, Mark]] = field(default_factory=deque)  # evaluations, from when to when
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def enough(self) -> int:
        """Evaluations that use the device about as well as any larger call; all that fit where that is not known."""
        for k, pace in sorted(self.paces.items()):
            twice = self.paces.get(k + 1, Pace())
            if min(pace.calls, twice.calls) < SURE or (times := twice.count / pace.count) < APART:
                continue
            if twice.seconds > HARDLY ** math.log2(times) * pace.seconds:
                return min(pace.count, self.size)
        return self.size

    @property
    def most(self) -> int:
        """Evaluations worth having in flight: further ones would only hold memory, and make each step longer.

        Where it is not known what is enough, twice as many as have been tried; all that fit where no call is timed.
        """
        if self.device.type not in MEASURES:
            return self.size
        tried = max((pace.count for pace in tuple(self.paces.values()) if pace.calls >= SURE), default=0)
        wanted = self.enough if self.enough < self.size else 2 * tried
        return min(max(wanted, FEW), self.size)

    def ask(self, count: int, call: Callable[[], T]) -> T:
        """What a call of so many evaluations answers; it is timed, without waiting for it."""
        if self.device.type not in MEASURES:
            return call()
        began = mark(self.device)
        answer = call()
        with self._lock:
            self._running.append((count, began, mark(self.device)))
            while self._running and (seconds := between(*self._running[0][1:])) is not None:
                self.note(self._running.popleft()[0], seconds)
        return answer

    def note(self, count: int, seconds: float) -> None:
        """A call of so many evaluations took so long."""
        before = self.paces.get(count.bit_length(), Pace())
        fastest = min((before.seconds, before.count), (seconds / count, count))
        self.paces[count.bit_length()] = Pace(before.calls + 1, *fastest)

    def wants_probe(self, count: int) -> bool:
        """Whether `PROBE` evaluations have to be measured before so many are asked."""
        has_room = self.ceiling == UNBOUNDED or (self._has_risen and self.ceiling >= PROBE)
        return count > PROBE and self.cost is None and has_room and self.device.type in MEASURES

    def probe(self, call: Callable[[], object]) -> None:
        """Measure a call of `PROBE` evaluations.

        Its answer is thrown away: measuring may change the last bits, and the first pictures of a process are to be
        computed as all later ones are.
        """
        token = _MEASURING.set(True)
        try:
            self.cost = MEASURES[self.device.type](call, self.device) / PROBE
        finally:
            _MEASURING.reset(token)
        self.refresh()

    def refresh(self) -> None:
        """Size the bucket by the memory that is free now."""
        free = None if self.cost is None else free_memory(self.device)
        if self.cost is not None and free is not None:
            room = int(SHARE[self.device.type] * free / max(self.cost, 1.0))
            self.size = min(1 << (max(room, 1).bit_length() - 1), self.ceiling)

    def succeed(self, count: int) -> None:
        """A step has come of calls that asked so many evaluations in all.

        Once that has been for a while, twice as many are asked at once again; steps that ask far less tell nothing.
        """
        self._is_relieved = False
        if self.ceiling == UNBOUNDED or 2 * count < self.ceiling:
            return
        self._calm += 1
        if self._calm >= self._patience:
            self._calm, self._has_risen = 0, True
            self.ceiling = min(2 * self.ceiling, UNBOUNDED)
            self.size = self.ceiling
            self.refresh()

    def halve(self, count: int) -> bool:
        """After memory ran out in a call of `count` evaluations, ask half from now on; False where one was too many.

        Before that is said others make room, if they can, once until something has come of it; sizes are tried anew.
        """
        if count == 1:
            if self._is_relieved or self.relief is None or not self.relief():
                self._is_relieved = False  # for whoever is next
                return False
            self._is_relieved, self._has_risen, self.ceiling = True, False, UNBOUNDED
            self.size = UNBOUNDED
            self.refresh()
            return True
        if self._has_risen:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._calm, self._has_risen = 0, False
        self.ceiling = min(self.ceiling, count // 2)
        self.size = min(self.size, self.ceiling)
        logger.warning("%s: memory ran out at %d evaluations, %d at once from here on", self.name, count, self.ceiling)
        return True

    def overflow(self, error: Exception, cure: str = "paint smaller, or in another dtype") -> MemoryError:
        """What to say where one evaluation alone was too many; it keeps nothing of what was in memory."""
        message = str(error).strip().partition("\n")[0]
        reason = MemoryError(f"{self.name}: not even one fits in memory; {cure} ({message})")
        reason.__cause__ = error.with_traceback(None)
        return reason


@dataclass(eq=False)
class Buckets:
    """The buckets of a model, which outlive its requests: what was measured once need not be again."""

    known: dict[Hashable, Bucket] = field(default_factory=dict)
    relief: Callable[[], bool] | None = None  # what all of them may ask for

    def of(self, stage: str, shape: tuple[int, ...], device: torch.device) -> Bucket:
        """The bucket of a network's stage ("decoder", ...) for one shape of its input."""
        return self.known.setdefault((stage, shape, device), Bucket(f"{stage} {shape}", device, relief=self.relief))


def is_measured() -> bool:
    """Whether what is computed now is a bucket's probe, whose answer nobody reads."""
    return _MEASURING.get()


def next_cut(ends: Sequence[int], start: int, size: int) -> int:
    """Where a chunk that begins at `start` ends: `size` further at most, between two groups where that costs no call.

    `ends` are where the groups end, ascending; the last is the number of all.
    """
    total = ends[-1]
    furthest = min(start + size, total)
    num_calls = -(-(total - start) // size)
    nearest = max(start + 1, total - (num_calls - 1) * size)  # cut before this, the rest would take a call more
    return max((end for end in ends if nearest <= end <= furthest), default=furthest)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no more to give; all but torch's for CUDA say so in a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


# --- how long a call takes ---------------------------------------------------------------------------------------


def mark(device: torch.device) -> Mark:
    """Now, as the device will have it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(began: Mark, ended: Mark) -> float | None:
    """Seconds from one moment to another; None where the device is not there yet."""
    if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        return began.elapsed_time(ended) / 1000 if ended.query() else None
    assert isinstance(began, float) and isinstance(ended, float), "moments of one device"
    return ended - began


# --- what a call takes -------------------------------------------------------------------------------------------


class Footprint(TorchDispatchMode):
    """Bytes at all the addresses that operations wrote new results to: no less than was ever in use at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._largest: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Of all addresses together."""
        return sum(self._largest.values())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for address, size in _storages(result):
            if address not in given:  # no view, and not written in place
                self._largest[address] = max(size, self._largest.get(address, 0))
        return result


def _storages(values: Any) -> list[tuple[int, int]]:
    """(address, bytes) of the memory behind every tensor in a nest of values."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [(storage.data_ptr(), storage.nbytes()) for storage in storages]


def _measure_cpu(call: Callable[[], object], device: torch.device) -> int:
    with Footprint() as footprint:
        call()
    return footprint.bytes


def _measure_cuda(call: Callable[[], object], device: torch.device) -> int:
    """By the allocator's own book, which the host keeps: nothing waits for the device.

    What has come to stay with the call, such as the network itself, is none of what calls take; whoever brings one
    begins the peak anew (`gen.offload`).
    """
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


# By kind of device; elsewhere a bucket holds everything until memory runs out.
MEASURES: dict[str, Callable[[Callable[[], object], torch.device], int]] = {"cpu": _measure_cpu, "cuda": _measure_cuda}
