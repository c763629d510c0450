"""Seconds and memory of this process, on the CPU and on CUDA, and what of multiplications a device can do."""

import time
from pathlib import Path

import torch

from gen.memory import peak_memory

ROOF_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices that are multiplied, by kind of device
ROOF_CALLS = 10

Moment = float | torch.cuda.Event


def now(device: torch.device | str) -> float:
    """The clock, when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def moment(device: torch.device | str) -> Moment:
    """A point in what the device does, which it is not waited for to reach."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Moment, second: Moment) -> float:
    """From one moment to another that the device has reached."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float) and isinstance(second, float), "moments of one device"
        return second - first
    return first.elapsed_time(second) / 1e3


def roof(device: torch.device | str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrices multiplied, the fastest of several."""
    side = ROOF_SIDE[torch.device(device).type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    took = []
    for _ in range(ROOF_CALLS):
        began = now(device)
        left @ right
        took.append(now(device) - began)
    return 2 * side**3 / min(took)


def reset_peak(device: torch.device | str) -> bool:
    """Forget the peak of memory so far; False where that cannot be done."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins again at what is resident
    except OSError:
        return False
    return True


def peak_mb(device: torch.device | str) -> float:
    """The peak of memory: what torch held on the GPU, or what of this process was resident."""
    return peak_memory(device) / 1e6
