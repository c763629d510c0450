"""Where and when a number was measured: machine, versions, date, commit.

Everything under `benchmarks/results/` carries it. Knows nothing of what was measured, and must not guess:
what cannot be found out is None.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    *("unclip", "torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "numpy"),
    *("openvino", "triton", "xformers"),  # which may be missing
)


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions, date (UTC) and git commit as one JSON object; `device` is where it ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(torch.device(device)),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
            "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
            "driver": _driver() if torch.device(device).type == "cuda" else None,
        },
    }


def commit() -> str | None:
    """The commit of this source tree, `+` behind it where files differ from it; None outside a checkout."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed inside some other repository
        return None
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, how much of it is ours, memory, threads and the accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """NVIDIA's, which all GPUs of a machine share."""
    output = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0] if output else None


def _git(*arguments: str) -> str | None:
    return _output("git", *arguments)


def _output(*command: str) -> str | None:
    """What a command says, asked beside this file; None: it failed."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
