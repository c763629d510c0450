"""Who computes a loaded network: torch itself, or OpenVINO on the CPU.

`run_by_openvino` lets OpenVINO answer for a network from outside, as `gen.attention` chooses its kernels: the module,
its weights and what it saves stay as they are. OpenVINO reads the network with its own torch front end when a shape is
first asked, computes so many rows at a time, and keeps what it compiled in memory, for the life of the process.
Nothing here knows rows, samplers, families or ranking.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gen.checkpoint import quiet

logger = logging.getLogger(__name__)

TORCH, OPENVINO = "torch", "openvino"
RUNTIMES = (TORCH, OPENVINO)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by the names in records
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # that OpenVINO is asked for, in its words

# Rows that OpenVINO is asked at a time, most first. A fixed number is faster than a free one, and each holds a copy of
# the weights, so they are few. Where rows are small, 32 are faster than four times 8; where they are large, they only
# take more memory.
SIZES = (32, 8, 2, 1)
SMALL = 1024  # values of a row's first input, such as a latent of four channels and 16 x 16 cells


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A precision by its name, or itself; ValueError for an unknown one."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype '{name}' is unknown; choose from: {', '.join(DTYPES)}")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """A precision's name."""
    return str(dtype).removeprefix("torch.")


def check_runtime(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError for an unknown runtime, and for one that is not installed or does not run so on this device."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime '{name}' is unknown; choose from: {', '.join(RUNTIMES)}")
    if name == TORCH:
        return
    if device.type != "cpu":
        raise ValueError(f"runtime '{name}' runs on the CPU, not on {device}; give device 'cpu', or runtime 'torch'")
    if dtype not in PRECISIONS:
        raise ValueError(f"runtime '{name}' computes in float32 or bfloat16, not in {name_of(dtype)}; give one")
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype is torch.bfloat16 and "BF16" not in able:
        raise ValueError(f"runtime '{name}' has no {name_of(dtype)} on this processor; give dtype float32")


@cache
def core() -> Any:
    """OpenVINO's own entry; ValueError that names the extra where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise ValueError(f"runtime 'openvino' is not installed ({error}); pip install 'unclip[openvino]'") from None
    return openvino.Core()


def run_by_openvino(network: nn.Module, dtype: torch.dtype) -> None:
    """Let OpenVINO compute a network whose weights are float32, in this precision.

    All that the network is handed as a tensor has a row's axis first. Who takes a gradient still asks torch.
    """
    answering = Answering(network, PRECISIONS[dtype])

    def forward(*args: Any, **kwargs: Any) -> Any:
        return answering(*args, **kwargs)

    network.forward = forward


@dataclass(eq=False)
class Answering:
    """OpenVINO in a network's place."""

    network: nn.Module
    precision: str  # in OpenVINO's words
    read: dict[Hashable, Converted] = field(default_factory=dict)  # by what tells calls apart but for their rows
    _one_at_a_time: Lock = field(default_factory=Lock)  # engines in other threads may ask the same network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the network's own forward answers."""
        leaves, layout = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            return type(self.network).forward(self.network, *args, **kwargs)
        (rows,) = {len(tensor) for tensor in given}
        key = (repr(layout), *((leaf.dtype, leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        with self._one_at_a_time:
            if key not in self.read:
                # In a thread of its own, where no dispatch mode of the caller's (`gen.bucket` has one) is traced.
                with ThreadPoolExecutor(1) as apart:
                    self.read[key] = apart.submit(convert, self.network, leaves, layout, self.precision).result()
            converted = self.read[key]
            sizes = SIZES if given[0][0].numel() <= SMALL else SIZES[1:]
            pieces = [converted.ask(size, [each[at] for each in given]) for size, at in pieces_of(rows, sizes)]
        return tree_unflatten([torch.cat(parts) for parts in zip(*pieces, strict=True)], converted.answer)


def pieces_of(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """So many rows in pieces of these sizes, of which the last is 1."""
    start = 0
    for size in sizes:
        while rows - start >= size:
            yield size, slice(start, start + size)
            start += size


@dataclass(eq=False)
class Converted:
    """A network as OpenVINO read it, for inputs of one shape but for their rows."""

    name: str  # for the log
    waves: Any  # an openvino.Model of its sines and cosines; None: there are none
    rest: Any  # an openvino.Model of the same inputs and those
    shapes: list[torch.Size]  # of each input, without its rows
    answer: TreeSpec  # how the network hands over its tensors
    precision: str
    compiled: dict[int, list[Any]] = field(default_factory=dict)  # openvino.CompiledModel, one after the other, by rows

    def ask(self, rows: int, given: Sequence[Tensor]) -> list[Tensor]:
        """What it answers to so many rows, one of `SIZES`."""
        if rows not in self.compiled:
            began = time.perf_counter()
            self.compiled[rows] = list(self._compiled(rows))
            logger.info("OpenVINO compiled %s for %d rows in %.1f s", self.name, rows, time.perf_counter() - began)
        arrays = [tensor.contiguous().numpy() for tensor in given]
        *before, last = self.compiled[rows]
        for waves in before:
            arrays += waves(arrays).values()
        answers = last(arrays)
        return [torch.from_numpy(answers[place]) for place in range(self.answer.num_leaves)]

    def _compiled(self, rows: int) -> Iterator[Any]:
        shapes = [[rows, *shape] for shape in self.shapes]
        if self.waves is not None:
            self.waves.reshape(dict(enumerate(shapes)))
            shapes += [list(wave.shape) for wave in self.waves.outputs]
            yield compiled(self.waves, PRECISIONS[torch.float32])
        self.rest.reshape(dict(enumerate(shapes)))
        yield compiled(self.rest, self.precision)


def compiled(model: Any, precision: str) -> Any:
    """An openvino.Model ready to run, on as many cores as torch takes."""
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return core().compile_model(model, "CPU", hints | {"INFERENCE_NUM_THREADS": torch.get_num_threads()})


class Flat(nn.Module):
    """A network as a tracer reads it: tensors in, tensors out."""

    def __init__(self, network: nn.Module, leaves: Sequence[Any], layout: TreeSpec) -> None:
        super().__init__()
        self.network = network
        self.told = Told([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], layout)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """`given` are all tensors that the network is handed, in their order."""
        tensors = iter(given)
        leaves = [next(tensors) if one is None else one[0] for one in self.told.fixed]
        args, kwargs = tree_unflatten(leaves, self.told.layout)
        answers, self.told.answer = tree_flatten(type(self.network).forward(self.network, *args, **kwargs))
        return tuple(answers)


@dataclass(eq=False)
class Told:
    """How a network is handed its tensors, and how it hands over its own."""

    fixed: list[tuple[Any] | None]  # what stands beside the tensors; None: a tensor's place
    layout: TreeSpec
    answer: TreeSpec | None = None  # None: it has not been asked yet


@torch.no_grad()
def convert(network: nn.Module, leaves: Sequence[Any], layout: TreeSpec, precision: str) -> Converted:
    """Have OpenVINO read a network by tracing one call of it."""
    began, name = time.perf_counter(), type(network).__name__
    flat = Flat(network, leaves, layout)
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    example = tuple(tensor[:1].repeat(2, *[1] * (tensor.ndim - 1)) for tensor in given)  # 1 row would be traced as such
    model = read(flat, example)
    assert flat.told.answer is not None, "tracing asks it"
    logger.info("OpenVINO read %s in %.1f s", name, time.perf_counter() - began)
    waves, rest = cut_waves(model)
    return Converted(name, waves, rest, [tensor.shape[1:] for tensor in given], flat.told.answer, precision)


def read(network: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """What OpenVINO's torch front end makes of a network by tracing one call, as an openvino.Model of free sizes.

    `openvino.convert_model` does the same, and tells its maker over the network that it was called.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with quiet(), warnings.catch_warnings():  # what is traced as a constant is the same in every call that comes here
        warnings.simplefilter("ignore")
        decoder = TorchScriptPythonDecoder(network, example_input=example, trace_kwargs={"check_trace": False})
        front_end = FrontEndManager().load_by_framework("pytorch")
        return front_end.convert(front_end.load(decoder))


def cut_waves(model: Any) -> tuple[Any, Any]:
    """A model (openvino.Model) in two: its sines and cosines (None: there are none), and the rest, which is given them.

    In bfloat16 the phase of a noise level near 1000 is off by whole radians, and a UNet's answers are twice as far off
    as torch's in bfloat16, where diffusers has these in float32. So they are in float32 here too.
    """
    import openvino
    from openvino import opset13

    cuts = [node.output(0) for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")]
    if not cuts:
        return None, model
    waves = openvino.Model(cuts, model.get_parameters(), "waves").clone()
    given = [opset13.parameter(cut.get_partial_shape(), cut.get_element_type()) for cut in cuts]
    for cut, parameter in zip(cuts, given, strict=True):
        for reader in cut.get_target_inputs():
            reader.replace_source_output(parameter.output(0))
    return waves, openvino.Model(model.get_results(), [*model.get_parameters(), *given], "rest")
