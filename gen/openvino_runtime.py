"""OpenVINO answers for a loaded network on the CPU.

`run_by_openvino` lets it do so from outside, as `gen.attention` chooses its kernels: the module, its weights and what
it saves stay as they are. OpenVINO reads the network with its own torch front end when a shape is first asked, computes
so many rows at a time, and keeps what it compiled in memory, for the life of the process. Nothing here knows rows,
samplers, families or ranking.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from gen.attention.texts import Texts
from gen.openvino_kernels import own_kernels
from gen.openvino_model import Part, cut_layers, cut_levels, drop_ones, fold, fold_norms, plain_norms, read
from gen.openvino_weights import WeightCache
from gen.pieces import LARGE_SIZES, SIZES, SMALL, Piece, pieces_of
from gen.traced import Call, Flat, stand_in

logger = logging.getLogger(__name__)

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # that OpenVINO is asked for, in its words

Inputs = Callable[[slice, list[np.ndarray]], Sequence[Any]]
"""inputs(rows, room) -> what a compiled network is given for them"""

KNOWN = 512  # different rows' levels and vectors whose embeddings are kept, of 10 to 100 KB each
AT_A_TIME = 16  # of them that are computed, always: what is kept must not depend on who else was there


@cache
def core() -> Any:
    """OpenVINO's own entry; ValueError that names the extra where it is not installed.

    It is kept: its CPU plugin gives the thread that loads it a stack for signals and takes that back with the last
    entry, in whichever thread it goes; the next signal would then end the process.
    """
    try:
        import openvino
    except ImportError as error:
        raise ValueError(f"runtime 'openvino' is not installed ({error}); pip install 'unclip[openvino]'") from None
    return openvino.Core()


def run_by_openvino(network: nn.Module, dtype: torch.dtype) -> None:
    """Let OpenVINO compute a network whose weights are float32, in this precision.

    All that the network is handed as a tensor has a row's axis first. Who takes a gradient still asks torch.
    """
    stand_in(network, Answering(network, PRECISIONS[dtype]))


@dataclass(eq=False)
class Answering:
    """OpenVINO in a network's place."""

    network: nn.Module
    precision: str  # in OpenVINO's words
    read: dict[Hashable, OpenVINONetwork] = field(default_factory=dict)  # by what tells calls apart but for their rows
    weights: WeightCache = field(default_factory=WeightCache)  # that our kernels read, whatever is compiled
    workers: list[ThreadPoolExecutor] = field(default_factory=list)  # one thread each: a stream's, whatever is compiled
    _one_at_a_time: Lock = field(default_factory=Lock)  # engines in other threads may ask the same network

    def __call__(self, call: Call) -> Any:
        """What the network's own forward answers."""
        with self._one_at_a_time:
            if call.kind not in self.read:
                # In a thread of its own, where no dispatch mode of the caller's (`gen.bucket` has one) is traced.
                with ThreadPoolExecutor(1) as apart:
                    asked = apart.submit(convert, self.network, call, self.precision, self.weights)
                    self.read[call.kind] = asked.result()
            converted = self.read[call.kind]
            of = None if call.texts is None else call.texts.of
            sizes = SIZES if call.given[0][0].numel() <= SMALL else LARGE_SIZES
            pieces = pieces_of(call.rows, of, sizes, streams_of(call.rows, torch.get_num_threads()))
            while len(self.workers) < min(len(pieces), torch.get_num_threads()):
                self.workers.append(ThreadPoolExecutor(1, f"unclip-openvino-{len(self.workers)}"))
            answers = converted.ask(call.given, call.texts, pieces, self.workers)
        return tree_unflatten(answers, converted.answer)


def streams_of(pieces: int, threads: int) -> int:
    """How many pieces are computed at a time, a power of two; fewer than threads share these, and one has them all."""
    return 1 << (min(pieces, threads).bit_length() - 1)


@dataclass(eq=False)
class Levels:
    """What a network makes of a row's noise level and vectors, computed once for each that is different.

    Rows of a step say the same, and so do those of every other picture in as many steps; but where each candidate has a
    vector of its own, such as an image embedding, every row of every step is new.
    """

    compiled: Any  # an openvino.CompiledModel, for any number of rows
    reads: list[int]
    vectors: list[int]  # the places of what tells rows apart, among all that the network is handed
    known: dict[bytes, np.ndarray] = field(default_factory=dict)  # of a row, oldest first

    @classmethod
    def of(cls, part: Part, vectors: list[int]) -> Levels:
        """In float32, whatever the rest is computed in."""
        return cls(compiled(part.model, PRECISIONS[torch.float32]), part.reads, vectors)

    def __call__(self, arrays: Sequence[Any]) -> np.ndarray:
        """What the rest is given (M, ...), of all that the network is handed, as arrays."""
        keys = [b"".join(arrays[place][row].tobytes() for place in self.vectors) for row in range(len(arrays[0]))]
        fresh = list({key: row for row, key in enumerate(keys) if key not in self.known}.items())
        for start in range(0, len(fresh), AT_A_TIME):
            some = fresh[start : start + AT_A_TIME]
            at = [row for _, row in some] + [some[0][1]] * (AT_A_TIME - len(some))
            (computed,) = self.compiled([arrays[place][at] for place in self.reads]).values()
            assert len(computed) == AT_A_TIME, "a row's axis comes first"
            self.known |= {key: computed[place].copy() for place, (key, _) in enumerate(some)}
        embeddings = np.stack([self.known[key] for key in keys])
        for key in list(self.known)[:-KNOWN]:
            del self.known[key]
        return embeddings


@dataclass(eq=False)
class OpenVINONetwork:
    """A network as OpenVINO read it, for inputs of one shape but for their rows."""

    name: str  # for the log
    levels: Levels | None  # None: it is handed no level and no vector
    rest: Part  # of what it is handed, what its layers read of a text, and what the levels say
    answer: TreeSpec  # how the network hands over its tensors
    precision: str  # in OpenVINO's words
    weights: WeightCache  # that our kernels read
    requests: dict[tuple[int, bool, int], list[Stream]] = field(default_factory=dict)

    def ask(
        self,
        given: Sequence[Tensor],
        texts: Texts | None,
        pieces: Sequence[Piece],
        workers: Sequence[ThreadPoolExecutor],
    ) -> list[Tensor]:
        """What it answers to rows that are cut into these pieces, several at a time (`streams_of`).

        Threads of ours wake sooner than OpenVINO's own, which saves a tenth of a small call. A compiled model's stream
        belongs to the thread that first asks in it, so `workers` are always the same, one for each stream at least.
        """
        arrays = [tensor.contiguous().numpy() for tensor in given]
        levels = None if self.levels is None else self.levels(arrays)
        read = read_of(texts)
        streams = streams_of(len(pieces), torch.get_num_threads())
        answers: list[np.ndarray] = []  # what other threads write into knows no mode of torch's
        for size, is_shared in dict.fromkeys((piece.size, piece.is_shared) for piece in pieces):
            alike = [piece.at for piece in pieces if (piece.size, piece.is_shared) == (size, is_shared)]
            inputs = partial(self.inputs, arrays, levels, read, is_shared)
            asked = self._streams(size, is_shared, streams, partial(inputs, alike[0], []))
            if not answers:
                shapes = [(len(arrays[0]), *each.get_shape()[1:]) for each in asked[0].request.model_outputs]
                answers = [np.empty(shape, np.float32) for shape in shapes]
            left = iter(alike)  # each is taken by whoever is free
            running: list[Future[None]] = []
            try:
                for stream, worker in zip(asked, workers, strict=False):
                    try:
                        running.append(worker.submit(stream.fill, answers, inputs, left))
                    except RuntimeError:  # the interpreter is ending, and its threads take nothing any more
                        stream.fill(answers, inputs, left)
                for each in running:
                    each.result()
            finally:  # also on Ctrl-C: what runs reads arrays of this call
                list(left)  # and nothing else begins
                wait(running)
        return [torch.from_numpy(each) for each in answers]

    def inputs(
        self,
        arrays: Sequence[Any],
        levels: np.ndarray | None,
        read: Sequence[np.ndarray] | None,
        is_shared: bool,
        at: slice,
        room: list[np.ndarray],
    ) -> list[Any]:
        """What the rest is given for some rows, all of which read one text where it is shared, as arrays.

        `read` is what layers read of each row's text (`read_of`). Rows' own texts are put side by side
        in the array in `room`, which is made where it is empty.
        """
        given = [each[at] for each in arrays]
        if read is not None and is_shared:
            given.append(read[at.start][None])
        elif read is not None:
            if not room:
                room.append(np.empty((len(read[at]), *read[0].shape), read[0].dtype))
            given.append(np.stack(read[at], out=room[0]))
        if levels is not None:
            given.append(levels[at])
        return [given[place] for place in self.rest.reads]

    def of_sizes(self, shapes: Sequence[Sequence[int]], threads: int) -> Any:
        """The rest as an openvino.Model for inputs of these sizes, that computes by so many threads."""
        from openvino import Type

        model = self.rest.model.clone()
        model.reshape(dict(enumerate(map(list, shapes))))
        is_low = self.precision == PRECISIONS[torch.bfloat16]
        own_kernels(model, threads, Type.bf16 if is_low else Type.f32, self.weights)
        if is_low:
            plain_norms(model)  # those that are left
        return model

    def _streams(self, size: int, is_shared: bool, streams: int, example: Callable[[], Sequence[Any]]) -> list[Stream]:
        """What computes pieces of a kind, that many at a time; `example` tells what one of them is given."""
        if (size, is_shared, streams) not in self.requests:
            began, given = time.perf_counter(), example()
            model = self.of_sizes([each.shape for each in given], threads_of(streams))
            ready = compiled(model, self.precision, streams)
            self.requests[size, is_shared, streams] = [Stream(ready.create_infer_request()) for _ in range(streams)]
            what = f"{self.name} for {size} rows, {streams} at a time"
            logger.info("OpenVINO compiled %s, in %.1f s", what, time.perf_counter() - began)
        return self.requests[size, is_shared, streams]


def read_of(texts: Texts | None) -> list[np.ndarray] | None:
    """What all layers read of the text of each row, in one; None: no text is handed over so."""
    if texts is None:
        return None
    flat = [each.numpy() for each in texts.flat]
    return [flat[text] for text in texts.of]


@dataclass(eq=False)
class Stream:
    """One of those that compute pieces of a kind at a time."""

    request: Any  # an openvino.InferRequest
    room: list[np.ndarray] = field(default_factory=list)  # where it is given texts of rows that have their own

    def fill(self, answers: Sequence[np.ndarray], inputs: Inputs, left: Iterator[slice]) -> None:
        """Compute pieces for as long as some are left: which rows of the answers, for what is told of them."""
        for at in left:
            found = self.request.infer(inputs(at, self.room), share_inputs=True, share_outputs=True)
            for place, answer in enumerate(answers):
                answer[at] = found[place]


def threads_of(streams: int) -> int:
    """How many threads a stream computes by, at least one."""
    return max(1, torch.get_num_threads() // streams)


def compiled(
    model: Any,  # an openvino.Model
    precision: str,  # in OpenVINO's words
    streams: int = 1,  # how many times at once it runs
    threads: int | None = None,  # of all of these; None: as many as torch takes
    counted: bool = False,  # whether OpenVINO counts how long each operation takes
) -> Any:
    """A model ready to run, an openvino.CompiledModel."""
    hints = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": str(streams)}
    hints |= {"ENABLE_CPU_PINNING": "NO"}  # the cores are not ours alone
    hints |= {"INFERENCE_NUM_THREADS": str(threads or torch.get_num_threads()), "PERF_COUNT": ("NO", "YES")[counted]}
    return core().compile_model(model, "CPU", hints)


@torch.no_grad()
def convert(network: nn.Module, call: Call, precision: str, weights: WeightCache) -> OpenVINONetwork:
    """Have OpenVINO read a network by tracing one call of it; its other calls' `weights` are used again."""
    began, name = time.perf_counter(), type(network).__name__
    flat = Flat(network, call)
    example = [tensor[:1].repeat(2, *[1] * (tensor.ndim - 1)) for tensor in call.given]  # 1 row would be traced as such
    pairs = [] if call.texts is None else [call.texts.of_rows(slice(1))]
    model = read(flat, (*example, *pairs))
    assert flat.call_layout.answer is not None, "tracing asks it"
    logger.info("OpenVINO read %s in %.1f s", name, time.perf_counter() - began)
    drop_ones(model)
    cut_layers(model)
    fold_norms(model)
    vectors = [place for place, tensor in enumerate(call.given) if tensor.ndim <= 2]
    levels, rest = cut_levels(model, vectors)
    fold(rest.model)  # of weights, so that all sizes have the same
    kept_levels = None if levels is None else Levels.of(levels, vectors)
    return OpenVINONetwork(name, kept_levels, rest, flat.call_layout.answer, precision, weights)
