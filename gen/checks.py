"""One value that a user gave: the value where it is as it should be, else a ValueError of one line that names it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def texts(name: str, value: object) -> tuple[str, ...]:
    """One text or a list of them as a tuple, else ValueError."""
    given = (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
    for text in given:
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}; give a text or a list of texts")
    return given


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` if it is a whole number of [low, high] (None: no end), else ValueError."""
    allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number of {low} or more"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r} is out of range; give {allowed}")
    return value


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Whether it is a finite number of [low, high]."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]


def real(name: str, value: object, low: float, high: float = math.inf, hint: str = "") -> float:
    """`value` if it is a finite number of [low, high], else ValueError."""
    if not is_number(value, low, high):
        allowed = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of {low:g} or more"
        raise ValueError(f"{name}={value!r} is out of range; give {allowed}" + (f" ({hint})" if hint else ""))
    return float(value)  # type: ignore[arg-type]


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} '{value}' is unknown; choose from: {', '.join(choices)}")


def shape_of(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError unless `tensor` is None or a finite tensor of `shape`."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; give a torch tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give {shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has numbers that are not finite; give finite ones")
