"""A GPU where there is none: tensors that say they lie on `cuda`, are computed on the CPU, and tell who waits for them.

`pretended` makes torch take the device; what is painted there is painted with true numbers. As on a GPU, tensors of two
devices do not mix, and it is written down where the host waits: what comes back, what goes there from memory that is
not pinned, and every operation whose answer's shape the host has to know. Gradients, streams and CUDA graphs need the
real thing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose answer, or its shape, the host reads.
READ = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Remote(Tensor):
    """A tensor that says it lies on the GPU; `inner` is it on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: Remote = Tensor._make_wrapper_subclass(cls, inner.shape, device=GPU, **layout)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # who has this is put whole in a weight's place
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: None, size: Any, stride: Any) -> Remote:
        return Remote(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operation as the devices of its tensors say, or the one that it is asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    are_remote = {isinstance(each, Remote) for each in tensors if each.dim() or isinstance(each, Remote)}
    asked = kwargs.get("device")
    to_gpu = any(are_remote) if asked is None else torch.device(asked).type == "cuda"
    if are_remote == {True, False} and func not in INDEXED | COPIES:
        raise RuntimeError(f"{func} of tensors on cuda:0 and on cpu")
    if any(are_remote) or to_gpu:
        Watch.now.look(func, args, kwargs, to_gpu)
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    here = tree_map(unwrapped, (args, kwargs))
    answer = func(*here[0], **here[1])
    if func is aten.copy_.default:
        return args[0]
    if not to_gpu or func is aten._local_scalar_dense.default:
        return answer.clone() if func is aten._to_copy.default and answer is here[0][0] else answer
    answer = tree_map(lambda value: Remote(value) if isinstance(value, Tensor) else value, answer)
    return return_and_correct_aliasing(func, args, kwargs, answer)


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, Remote) else value


class Watch(TorchDispatchMode):
    """Computes what is asked of the GPU, and writes down where the host waits for it."""

    now: ClassVar[Watch]

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # "file:line what", in their order
        self.pinned: dict[int, Tensor] = {}  # by address; kept, or another would come to lie there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def wait(self, what: object) -> None:
        ours = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
        where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "elsewhere"
        self.waits.append(f"{where} {what}")

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.pinned[copy.data_ptr()] = copy
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self.pinned

    def look(self, func: Any, args: Any, kwargs: Mapping[str, Any], to_gpu: bool) -> None:
        """Whether the host waits for this operation."""
        if func in READ:
            self.wait(func)
        elif func in INDEXED and isinstance(args[0], Remote):
            self.look_at_index([each for each in args[1] if each is not None])
        elif func is aten._to_copy.default and isinstance(args[0], Remote) != to_gpu:
            self.look_at_copy(args[0], bool(kwargs.get("non_blocking")), to_gpu)
        elif func is aten.copy_.default and isinstance(args[0], Remote) != isinstance(args[1], Remote):
            here = args[1] if isinstance(args[0], Remote) else args[0]
            self.look_at_copy(here, len(args) > 2 and args[2], isinstance(args[0], Remote))

    def look_at_copy(self, here: Tensor, non_blocking: bool, to_gpu: bool) -> None:
        if not non_blocking or (not isinstance(here, Remote) and not self.is_pinned(here)):
            self.wait("a copy to the GPU" if to_gpu else "a copy from the GPU")

    def look_at_index(self, index: list[Tensor]) -> None:
        if any(each.dtype in (torch.bool, torch.uint8) for each in index):
            self.wait("a mask as index")
        if any(not isinstance(each, Remote) for each in index):
            self.wait("an index from the CPU")


def is_ours(name: str) -> bool:
    path = Path(name)
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv") and path != Path(__file__)


class Words(TorchFunctionMode):
    """What torch's Python side would ask of the driver before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        given: tuple[Any, ...] = tuple(map(full, args))
        named = {name: full(value) for name, value in (kwargs or {}).items()}
        first = given[0] if given else None
        if func in ANSWERS and isinstance(first, Remote):
            return ANSWERS[func](*given, **named)
        if func is Tensor.pin_memory:
            return Watch.now.pin(given[0])
        if func is torch.empty_like and named.pop("pin_memory", False):
            return Watch.now.pin(func(unwrapped(first), **named))
        if func in (torch.tensor, torch.as_tensor) and named.get("device") == GPU and not isinstance(first, Remote):
            Watch.now.wait(func.__name__)
            return Remote(func(*given, **(named | {"device": "cpu"})))
        if func is F.scaled_dot_product_attention and isinstance(named.get("query", first), Remote):
            here = tree_map(unwrapped, (given, named))  # torch asks the driver what kernels there are
            return Remote(func(*here[0], **here[1]))
        return func(*given, **named)


def full(value: Any) -> Any:
    """The GPU with its number, which torch would ask the driver for."""
    is_gpu = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"
    return GPU if is_gpu else value


def _listed(tensor: Remote) -> Any:
    Watch.now.wait("tolist")
    return tensor.inner.tolist()


def _new(tensor: Remote, *args: Any, **kwargs: Any) -> Remote:
    Watch.now.wait("new_tensor")
    return Remote(tensor.inner.new_tensor(*args, **kwargs))


ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {Tensor.tolist: _listed, Tensor.new_tensor: _new}


class Event:
    """A moment that has come."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Watch.now.wait("an event")

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Generator(torch.Generator):
    """One of the CPU, wherever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)


@contextmanager
def pretended() -> Iterator[Watch]:
    """Within it torch has a GPU of 8 GiB, in this thread."""
    gigabyte = 1 << 30
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "mem_get_info": lambda device=None: (8 * gigabyte, 8 * gigabyte),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: gigabyte // 1024,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: None,
        "synchronize": lambda device=None: Watch.now.wait("synchronize"),
        "Event": Event,
    }
    with ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        # Weights that come back from there are no longer of our class.
        swaps = "get_swap_module_params_on_conversion"
        stack.enter_context(patch.object(torch.__future__, swaps, lambda: True))
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as for torch's own FakeTensorMode
        Watch.now = Watch()
        for each in (torch.no_grad(), Words(), Watch.now):
            stack.enter_context(each)
        yield Watch.now
