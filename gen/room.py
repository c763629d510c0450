"""Whether there is room for a model, asked before any memory is taken for it.

Owns what is refused of a configuration's sizes and of a machine's memory; both in one line that says how much. It reads
no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

LARGEST = 1_000_000  # of any whole number in a configuration; vocabularies reach some 250,000
MOST_LAYERS = 1_000  # of what is built one after the other
SPARE = 100_000_000  # numbers that a network may have beyond those of its files, to be missed name by name


def check_sizes(config: Mapping[str, Any], folder: Path) -> None:
    """ValueError for a configuration that asks for sizes no network has."""
    for name, value in _whole_numbers(config):
        most = MOST_LAYERS if "layers" in name else LARGEST
        if abs(value) > most:
            raise ValueError(f"model part '{folder}' asks for {name}={value} in its config.json; give {most} at most")


def check_asked(network: nn.Module, held: int, folder: Path) -> None:
    """ValueError for a network (on the meta device) that is far larger than the weights for it."""
    asked = sum(weight.numel() for weight in network.parameters())
    if asked > held + SPARE:
        raise ValueError(
            f"model part '{folder}' asks for {asked:,} numbers in its config.json, and its files hold {held:,}; "
            "correct the one or fetch the other again"
        )


def check_room(num_weights: int, device: torch.device | str, dtype: torch.dtype, what: str) -> None:
    """ValueError for a model of so many numbers that a device has no room for, as far as it tells."""
    needed, free = num_weights * dtype.itemsize, free_memory(torch.device(device))
    if free is not None and needed > free:
        raise ValueError(
            f"model '{what}' needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 1e9:.1f} GB are free on {device}; take a smaller dtype, another device or a smaller model"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()  # Linux
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines)
    return int(told["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in told else None


def _whole_numbers(told: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration by the name it stands under."""
    for name, value in told.items():
        if isinstance(value, Mapping):
            yield from _whole_numbers(value)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and not isinstance(each, bool):
                yield name, each
