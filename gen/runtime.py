"""What networks are computed by, where, and in which precision, by the names that people and records give them."""

from __future__ import annotations

import torch
from torch import nn

from gen.attention.kernels import AUTO, TORCHS_CHOICE
from gen.compile_runtime import check_compile, run_compiled
from gen.openvino_runtime import PRECISIONS, core, run_by_openvino

TORCH, COMPILE, OPENVINO = "torch", "compile", "openvino"
RUNTIMES = (TORCH, COMPILE, OPENVINO)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by the names in records


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A precision by its name, or itself; ValueError for an unknown one."""
    if isinstance(name, torch.dtype) and name in (*DTYPES.values(), torch.float64):
        return name
    if not isinstance(name, str) or name not in DTYPES:
        name = name_of(name) if isinstance(name, torch.dtype) else name
        raise ValueError(f"dtype '{name}' is unknown; choose from: {', '.join(DTYPES)}")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """A precision's name."""
    return str(dtype).removeprefix("torch.")


def usable(device: torch.device | str | int) -> torch.device:
    """The device; ValueError where torch does not know it, cannot reach it, or cannot compute there what is needed."""
    try:
        level = torch.zeros((), dtype=torch.float64, device=device)  # as noise levels are; MPS has no float64
        level.item()  # which "meta", a device without memory, cannot tell
        return level.device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device '{device}' cannot be used ({reason}); give cpu, cuda, ..., or leave it out") from None


def check_runtime(name: str, device: torch.device, dtype: torch.dtype, attention: str = AUTO) -> None:
    """ValueError for an unknown runtime, and for one that is not installed or does not run so on this device."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime '{name}' is unknown; choose from: {', '.join(RUNTIMES)}")
    if name == COMPILE:
        check_compile(device, attention)
    if name != OPENVINO:
        return
    if attention != AUTO:
        raise ValueError(f"attention '{attention}' is torch's, and runtime '{name}' has its own; leave one out")
    if device.type != "cpu":
        raise ValueError(f"runtime '{name}' runs on the CPU, not on {device}; give device 'cpu', or runtime 'torch'")
    if dtype not in PRECISIONS:
        raise ValueError(f"runtime '{name}' computes in float32 or bfloat16, not in {name_of(dtype)}; give one")
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype is torch.bfloat16 and "BF16" not in able:
        raise ValueError(f"runtime '{name}' has no {name_of(dtype)} on this processor; give dtype float32")


def run(network: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Let a runtime compute a network in a precision, anew where its weights have changed.

    Torch and what it compiles compute in that of the weights; OpenVINO reads float32 and lowers it.
    """
    if name == OPENVINO:
        run_by_openvino(network, dtype)
    elif name == COMPILE:
        run_compiled(network)


def attention_of(name: str, attention: str, device: torch.device) -> str:
    """The kernel that a runtime is to find in a UNet, where this one was asked for.

    OpenVINO reads torch's own and replaces it. What torch compiles on CUDA is left torch's own choice, since those that
    `auto` would take are not traced.
    """
    is_left = name == OPENVINO or (name == COMPILE and attention == AUTO and device.type == "cuda")
    return TORCHS_CHOICE if is_left else attention
