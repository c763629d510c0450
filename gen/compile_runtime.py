"""torch.compile answers for a loaded network, on a GPU as CUDA graphs.

`run_compiled` lets it do so from outside, as `gen.openvino_runtime` does: the module, its weights and what it saves
stay as they are. A network is traced when a shape is first asked (torch.export) and compiled for few fixed numbers of
rows: whatever rows are in flight, the same programs answer. What all layers read of a text is handed over as one
tensor. Nothing here knows rows, samplers, families or ranking.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from gen.attention.network import adds_keys
from gen.bucket import is_measured
from gen.compiled import COMPILERS
from gen.memory import set_apart
from gen.pieces import LARGE_SIZES, SIZES, SMALL, Piece, pieces_of
from gen.traced import Call, Flat, stand_in

logger = logging.getLogger(__name__)

CUDA_SIZES = (32, 16, 8, 4, 2, 1)  # rows at a time on a GPU, where large calls are the fast ones
# Attention's kernels that a tracer keeps: operations of their own, and torch's choice. The others are torch's too, but
# asked for by a switch that is not traced.
KERNELS = ("auto", "sdpa", "avx512", "xformers")
WARM = 3  # calls before a CUDA graph is captured: libraries choose and allocate in the first ones

BUILDING = Lock()  # torch traces one network at a time, and captures one graph

Program = Callable[..., Sequence[Tensor]]
"""A network for so many rows: tensors in, tensors out"""


def check_compile(device: torch.device, attention: str) -> None:
    """ValueError where nothing can be compiled for this device, or attention's kernel would be lost."""
    if attention not in KERNELS:
        problem = f"runtime 'compile' compiles attention itself; attention '{attention}' is for runtime 'torch'"
        raise ValueError(f"{problem}; choose from: {', '.join(KERNELS)}")
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), *COMPILERS]))):  # triton needs one too
        raise ValueError(f"runtime 'compile' needs a C++ compiler ({', '.join(COMPILERS)}, or what CXX names)")
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError("runtime 'compile' needs triton on a GPU; pip install triton, or give runtime 'torch'")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"runtime 'compile' is for the CPU and for CUDA, not for {device}; give runtime 'torch'")


def run_compiled(network: nn.Module) -> None:
    """Let what torch compiles compute a network, in the precision of its weights.

    All that the network is handed as a tensor has a row's axis first. Who takes a gradient still asks the network.
    """
    stand_in(network, Compiling(network))


class Common(NamedTuple):
    """What all CUDA graphs of a network share, since one runs at a time: memory is a stream's, also within a pool."""

    pool: Any
    stream: torch.cuda.Stream


@dataclass(eq=False)
class Compiling:
    """Compiled programs in a network's place."""

    network: nn.Module
    known: dict[Hashable, Compiled] = field(default_factory=dict)  # by what calls have in common
    _one_at_a_time: Lock = field(default_factory=Lock)  # engines in other threads may ask the same network
    _common: Common | None = None  # None: none yet, or it computes on the CPU

    def __call__(self, call: Call) -> Any:
        """What the network's own forward answers."""
        if is_measured():  # two rows, of which nothing has to be compiled
            args, kwargs = tree_unflatten(call.leaves, call.layout)
            return type(self.network).forward(self.network, *args, **kwargs)
        with self._one_at_a_time, torch.no_grad():
            if call.kind not in self.known:
                self.known[call.kind] = Compiled(Flat(self.network, call), self._shared(call.given[0].device))
            compiled = self.known[call.kind]
            answers = [compiled.ask(call, piece) for piece in self._pieces(call)]
            whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*answers, strict=True)]
        answer = compiled.flat.call_layout.answer
        assert answer is not None, "it has been traced"
        return tree_unflatten(whole, answer)

    def _shared(self, device: torch.device) -> Common | None:
        if device.type == "cuda" and self._common is None:
            self._common = Common(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))
        return self._common

    def _pieces(self, call: Call) -> list[Piece]:
        """Rows that are asked together; those whose layers see text and picture at once do not share the text."""
        of = None if call.texts is None or adds_keys(self.network) else call.texts.of
        first = call.given[0]
        sizes = CUDA_SIZES if first.is_cuda else SIZES if first[0].numel() <= SMALL else LARGE_SIZES
        return pieces_of(call.rows, of, sizes)


@dataclass(eq=False)
class Compiled:
    """A network for calls of one kind."""

    flat: Flat
    common: Common | None  # of CUDA graphs; None on the CPU
    programs: dict[tuple[int, bool], Program] = field(default_factory=dict)  # by rows, and whether these share a text

    def ask(self, call: Call, piece: Piece) -> Sequence[Tensor]:
        """What it answers to some rows."""
        given = [tensor[piece.at].contiguous() for tensor in call.given]
        if call.texts is not None:
            at = slice(piece.at.start, piece.at.start + 1) if piece.is_shared else piece.at
            given.append(call.texts.of_rows(at))
        key = piece.size, piece.is_shared
        if key not in self.programs:
            self.programs[key] = self._program(given, piece.size)
        return self.programs[key](*given)

    def _program(self, given: Sequence[Tensor], rows: int) -> Program:
        began = time.perf_counter()
        with BUILDING:
            traced = torch.export.export(self.flat, tuple(given), strict=False).module()
            program: Program = torch.compile(traced, fullgraph=True, dynamic=False)
            program(*given)
            if self.common is not None:
                program = Graph(program, given, self.common)
        what = f"{type(self.flat.network).__name__} for {rows} rows"
        logger.info("torch compiled %s, in %.1f s", what, time.perf_counter() - began)
        return program


class Graph:
    """A program as one CUDA graph: the host says a single thing where it said hundreds, and waits for nothing."""

    def __init__(self, program: Program, given: Sequence[Tensor], common: Common) -> None:
        self._given = [tensor.clone() for tensor in given]
        self._device = given[0].device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            now, apart = torch.cuda.current_stream(), common.stream
            apart.wait_stream(now)
            with torch.cuda.stream(apart):
                for _ in range(WARM):
                    program(*self._given)
            # Other threads may go on meanwhile.
            with torch.cuda.graph(self._graph, pool=common.pool, stream=apart, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(self._device)  # here, for what is in store was let go of just now
                self._answers = program(*self._given)
            now.wait_stream(apart)
            taken = max(0, torch.cuda.memory_reserved(self._device) - before)
            set_apart(self._device, taken)
            weakref.finalize(self, set_apart, self._device, -taken)

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """What the program answers; the graph's own tensors are overwritten by the next call."""
        with torch.cuda.device(self._device):
            for own, tensor in zip(self._given, given, strict=True):
                own.copy_(tensor)
            self._graph.replay()
            return [answer.clone() for answer in self._answers]
