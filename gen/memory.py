"""What memory is free on a device: of the machine, of what its container may take, of what torch holds in store.

And the most that this process has held.
"""

from __future__ import annotations

from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STATUS = Path("/proc/self/status")
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
    amounts = [amount for amount in (of_system(), of_control_group()) if amount is not None]
    return min(amounts, default=None)


def reserve() -> int:
    """Bytes that a machine may find beyond what is free: on a disk, and in files that a container has read of late."""
    swap, files = number_behind(MEMINFO, "SwapFree:"), number_behind(CONTROL_GROUP / "memory.stat", "active_file")
    return (swap or 0) * 1024 + (files or 0)


def peak_memory(device: torch.device | str) -> int:
    """Most bytes that this process ever held: what torch did of a GPU, or what was resident; 0 where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = number_behind(STATUS, "VmHWM:")  # Linux; unlike getrusage not inherited from the parent
    if resident is not None:
        return resident * 1024
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def in_store(device: torch.device) -> int:
    """What torch holds of a GPU and can give out."""
    store = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, store - _APART.get(device, 0))


def set_apart(device: torch.device, num_bytes: int) -> None:
    """So much of what torch holds of a GPU is for CUDA graphs alone from now on; less than nothing: no longer."""
    _APART[device] = _APART.get(device, 0) + num_bytes


def of_system() -> int | None:
    """What the machine has left; None off Linux."""
    available = number_behind(MEMINFO, "MemAvailable:")
    return None if available is None else available * 1024


def of_control_group() -> int | None:
    """What a container's limit leaves (cgroup v2), files that it has read and can forget among it; None: no limit."""
    try:
        most = int((CONTROL_GROUP / "memory.max").read_text())
        taken = int((CONTROL_GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(0, most - taken + (number_behind(CONTROL_GROUP / "memory.stat", "inactive_file") or 0))


def number_behind(path: Path, name: str) -> int | None:
    """The number behind a name in a file of lines; None where there is none."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return next((int(words[1]) for words in lines if words[:1] == [name]), None)
    except (OSError, ValueError):
        return None
