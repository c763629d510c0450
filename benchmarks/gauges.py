"""Seconds and memory of this process, on the CPU and on CUDA."""

import time
from pathlib import Path

import torch


def now(device: torch.device | str) -> float:
    """The clock, when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
