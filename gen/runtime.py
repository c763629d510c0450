"""What networks are computed by, where, and in which precision, by the names that people and records give them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from gen.attention.kernels import AUTO, TORCHS_CHOICE, check_attention
from gen.attention.network import adds_keys
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


@dataclass(frozen=True)
class Compute:
    """Who computes networks, in which precision, and by which kernel attention is."""

    dtype: torch.dtype = torch.float32
    runtime: str = TORCH
    attention: str = AUTO  # the UNet's kernel, as it was asked for

    def to_json(self) -> dict[str, str]:
        """As it stands in a record, as far as it shows in pixels."""
        return {"dtype": name_of(self.dtype), "attention": self.attention, "runtime": self.runtime}

    @property
    def weights_in(self) -> torch.dtype:
        """The precision that weights are read in; a lower one is OpenVINO's to make."""
        return torch.float32 if self.runtime == OPENVINO else self.dtype

    def on(self, device: torch.device | str | int | None) -> torch.device:
        """The device, or where none is named CUDA if there is one; ValueError where networks are not computed so there.

        It is for an unknown runtime, for one that is not installed, and for a kernel that does not run there too.
        """
        device = self._place(device)
        self._check_runtime(device)
        check_attention(self.attention, device, self.dtype)
        return device

    def possible_on(self, device: torch.device | str | int | None) -> Compute:
        """The same, with attention 'auto' where the device cannot run that kernel; ValueError for no such device."""
        place = self._place(device)
        try:
            check_attention(self.attention, place, self.dtype)
        except ValueError:
            return replace(self, attention=AUTO)
        return self

    def check_unets(self, unets: Iterable[nn.Module], family: str) -> None:
        """ValueError for a family's UNets that the runtime cannot compute."""
        if self.runtime == OPENVINO and any(adds_keys(unet) for unet in unets):
            problem = (
                f"runtime '{self.runtime}' cannot compute the UNet of a {family}, whose layers see text and picture"
            )
            raise ValueError(f"{problem} at once (OpenVINO crashes on them); give runtime 'torch'")

    def lay_out(self, network: nn.Module, device: torch.device) -> None:
        """Have convolutions' weights lie as the device reads them: with channels last on CUDA, as is asked of cuDNN.

        What is compiled for CUDA is laid out by whom compiles it; on CPUs it gains nothing that was measured.
        """
        if self.runtime == TORCH and device.type == "cuda":
            nn.Module.to(network, memory_format=torch.channels_last)

    def run(self, network: nn.Module) -> None:
        """Let the runtime compute a network, anew where its weights have changed.

        Torch and what it compiles compute in the weights' precision; OpenVINO reads float32 and lowers it.
        """
        if self.runtime == OPENVINO:
            run_by_openvino(network, self.dtype)
        elif self.runtime == COMPILE:
            run_compiled(network)

    def kernel(self, device: torch.device) -> str:
        """The kernel of attention that the runtime is to find in a UNet.

        OpenVINO reads torch's own and replaces it. What torch compiles on CUDA is left torch's own choice, since those
        that `auto` would take are not traced.
        """
        is_compiled = self.runtime == COMPILE and self.attention == AUTO and device.type == "cuda"
        return TORCHS_CHOICE if self.runtime == OPENVINO or is_compiled else self.attention

    def _place(self, device: torch.device | str | int | None) -> torch.device:
        if device is None:
            device = "cuda" if torch.cuda.is_available() and self.runtime != OPENVINO else "cpu"
        return usable(device)

    def _check_runtime(self, device: torch.device) -> None:
        name, attention = self.runtime, self.attention
        if name not in RUNTIMES:
            raise ValueError(f"runtime '{name}' is unknown; choose from: {', '.join(RUNTIMES)}")
        if name == COMPILE:
            check_compile(device, attention)
        if name != OPENVINO:
            return
        if attention != AUTO:
            raise ValueError(f"attention '{attention}' is torch's, and runtime '{name}' has its own; leave one out")
        if device.type != "cpu":
            raise ValueError(
                f"runtime '{name}' runs on the CPU, not on {device}; give device 'cpu', or runtime 'torch'"
            )
        if self.dtype not in PRECISIONS:
            raise ValueError(
                f"runtime '{name}' computes in float32 or bfloat16, not in {name_of(self.dtype)}; give one"
            )
        able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.dtype is torch.bfloat16 and "BF16" not in able:
            raise ValueError(f"runtime '{name}' has no {name_of(self.dtype)} on this processor; give dtype float32")
