"""Where a network computes; how small tensors reach that device, and come from it, without anybody waiting."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network_device(network: nn.Module) -> torch.device:
    """Where a network computes: where its first vector lies, for larger weights may wait elsewhere (`gen.offload`)."""
    weights = network.parameters()
    first = next(weights)
    return first.device if first.ndim < 2 else next((weight for weight in weights if weight.ndim < 2), first).device


def weights_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of a network's weights, read off the first; diffusers' own `dtype` walks every module each time."""
    return next(network.parameters()).dtype


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from the CPU to CUDA through pinned memory, so that nothing waits for the copy."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A tensor on the CPU, and what its reader waits for first (`Event.synchronize`); None: it is there."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    here = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(tensor.device))
    return here, there
