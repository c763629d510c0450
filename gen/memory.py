"""What memory is free on a device: of the machine, of what its container may take, of what torch holds in store."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
_APART: dict[torch.device, int] = {}


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be had on the device now; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + in_store(device)
    if device.type != "cpu":
        return None
    told = [amount for amount in (of_system(), of_control_group()) if amount is not None]
    return min(told, default=None)


def in_store(device: torch.device) -> int:
    """What torch holds of a GPU and can give out."""
    store = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, store - _APART.get(device, 0))


def set_apart(device: torch.device, num_bytes: int) -> None:
    """So much of what torch holds of a GPU is for CUDA graphs alone from now on."""
    _APART[device] = _APART.get(device, 0) + num_bytes


def of_system() -> int | None:
    """What the machine has left."""
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError):
        return None


def of_control_group() -> int | None:
    """What a container's limit leaves (cgroup v2), files that it has read and can forget among it; None: no limit."""
    try:
        most = int((CONTROL_GROUP / "memory.max").read_text())
        taken = int((CONTROL_GROUP / "memory.current").read_text())
        told = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        return max(0, most - taken + int(told.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such file, or "max"
        return None
