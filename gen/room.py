"""Whether a machine has room for a model, asked before any memory is taken for it; in one line that says how much."""

from __future__ import annotations

import torch

from gen.memory import free_memory


def check_room(num_weights: int, device: torch.device | str, dtype: torch.dtype, what: str) -> None:
    """ValueError for a model of so many numbers that a device has no room for, as far as it tells."""
    needed, free = num_weights * dtype.itemsize, free_memory(torch.device(device))
    if free is not None and needed > free:
        raise ValueError(
            f"model '{what}' needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 1e9:.1f} GB are free on {device}; take a smaller dtype, another device or a smaller model"
        )
