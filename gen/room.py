"""Whether a machine has room for a model or a picture, asked before any memory is taken; in one line of how much."""

from __future__ import annotations

import torch

from gen.memory import free_memory, reserve
from gen.settings import Settings


class NoRoom(ValueError):
    """A model's weights do not all fit a device."""


def check_room(num_weights: int, device: torch.device | str, dtype: torch.dtype, what: str) -> None:
    """NoRoom for a model of so many numbers that a device has no room for, as far as it tells."""
    device = torch.device(device)
    needed, free = num_weights * dtype.itemsize, free_memory(device)
    if free is not None and needed > free + found_beyond(device):
        raise NoRoom(
            f"model '{what}' needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 1e9:.1f} GB are free on {device}; take a smaller dtype, another device or a smaller model"
        )


def check_picture(num_bytes: int, tiled: int, device: torch.device, settings: Settings, leaving: int) -> None:
    """ValueError for a picture of which a network holds so many bytes at once, where a device cannot have them.

    `tiled` is how many it were with `vae_tiling`; `leaving` bytes lie there that would make room.
    """
    free = free_memory(device)
    if free is None:
        return
    room = free + leaving
    if num_bytes > room + found_beyond(device):
        tiles_help = tiled < num_bytes and tiled <= room + found_beyond(device)
        cure = "give a smaller one, or vae_tiling=True" if tiles_help else "give a smaller one"
        there = "could be had" if leaving else "are free"
        raise ValueError(
            f"a picture of height {settings.height} and width {settings.width} needs {num_bytes / 1e9:.1f} GB at the "
            f"very least, and {room / 1e9:.1f} GB {there} on {device}; {cure}"
        )


def found_beyond(device: torch.device) -> int:
    """Bytes that may be found beyond what is free."""
    return reserve() if device.type == "cpu" else 0
