"""One value that a user gave: the value where it is as it should be, else a ValueError of one line that names it."""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
from collections.abc import Sequence
from types import UnionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = sys.float_info.max  # beyond it a whole number is no float
SHOWN = 60  # letters of a wrong value in an error


def texts(name: str, value: object) -> tuple[str, ...]:
    """One text or a list of them as a tuple, else ValueError."""
    given = (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
    for text in given:
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}; give a text or a list of texts")
    return given


def check_name(name: str, value: object) -> None:
    """ValueError unless `value` can be a name or a path."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={shortened(value)} is of type {type(value).__name__}; give a name or a path")


def check_callback(callback: object) -> None:
    """ValueError unless it is None or can be called."""
    if callback is not None and not callable(callback):
        problem = f"callback={shortened(callback)} is of type {type(callback).__name__}"
        raise ValueError(f"{problem}; give a function, which is called with each step")


def count_of(number: int, what: str) -> str:
    """So many of them, in words."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def as_number(value: object) -> Any:
    """A number as Python's own, of whatever library it was, for records are JSON; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | Tensor | np.ndarray):  # the last two hold several, or one in a list
        return value
    if hasattr(type(value), "__index__"):
        return operator.index(value)  # type: ignore[arg-type]
    return float(value) if isinstance(value, numbers.Real) else value


def is_of(value: object, kinds: type | UnionType) -> bool:
    """Whether it is of these kinds of numbers, and no bool."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def refusal(name: str, value: object, allowed: str, kinds: type | UnionType = int | float) -> ValueError:
    """What is said of a number that is not as it should be: that it is none of these kinds, or not in range."""
    if isinstance(value, Tensor | np.ndarray):
        return ValueError(f"{name} is of type {type(value).__name__} and shape {tuple(value.shape)}; give {allowed}")
    wrong = "out of range" if is_of(value, kinds) else f"of type {type(value).__name__}"
    return ValueError(f"{name}={shortened(value)} is {wrong}; give {allowed}")


def shortened(value: object) -> str:
    """How Python writes it, in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def boolean(name: str, value: object) -> bool:
    """`value` if it is True or False, else ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; give True or False")
    return value


def integer(name: str, value: object, low: int, high: int | None = None, hint: str = "") -> int:
    """`value` as Python's own if it is a whole number of [low, high] (None: no end), else ValueError."""
    number = as_number(value)
    if not is_of(number, int) or number < low or (high is not None and number > high):
        allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number of {low} or more"
        raise refusal(name, number, allowed + (f" ({hint})" if hint else ""), int)
    return int(number)


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Whether it is a finite number of [low, high]."""
    number = as_number(value)
    return is_of(number, int | float) and -LARGEST <= number <= LARGEST and low <= number <= high


def finite_float(name: str, value: object, low: float, high: float = math.inf, hint: str = "") -> float:
    """`value` as Python's own if it is a finite number of [low, high], else ValueError."""
    number = as_number(value)
    if not is_number(number, low, high):
        allowed = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of {low:g} or more"
        raise refusal(name, number, allowed + (f" ({hint})" if hint else ""))
    return float(number)


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
