"""Rows: what a sampler is given and what it gives back.

A row is one picture in the making. Every tensor here has the row as its first axis, so rows of many requests,
at different noise levels, share a step, and `select` and `cat` are right for every sampler. There is one
convention: x = x0 + sigma * eps, in float32. Nothing here knows samplers, networks, prompts or what pixels mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """The noisy rows and what is remembered of them."""

    x: Tensor  # (B, ...) float32, x0 + sigma * eps
    memory: dict[str, Tensor] = field(default_factory=dict)  # every value (B, ...)

    def select(self, rows: Tensor | slice) -> State:
        """The rows that go on: indices (K,) in any order, a mask (B,), or a slice, which is a view."""
        return State(self.x[rows], {name: value[rows] for name, value in self.memory.items()})

    def cat(self, other: State) -> State:
        """These rows, then the other's; both must remember the same things."""
        assert self.memory.keys() == other.memory.keys(), "rows of samplers with different memories"
        memory = {name: torch.cat([value, other.memory[name]]) for name, value in self.memory.items()}
        return State(torch.cat([self.x, other.x]), memory)

    def remember(self, **values: Tensor) -> State:
        """The same rows with these values (B, ...) in their memory, such as the momentum of `guidance.project`.

        `advance` hands on what is not its sampler's own.
        """
        return State(self.x, {**self.memory, **values})


@dataclass(frozen=True)
class Level:
    """Where each row stands in its own schedule."""

    sigma: Tensor  # (B,) float32
    index: Tensor  # (B,) int64, 0 at the row's first level
    steps_left: Tensor  # (B,) int64, 0 at the row's last level


@dataclass(frozen=True)
class Prediction:
    """What a denoiser believes of the clean rows."""

    x0: Tensor  # (B, ...) float32
    # (B, ...) of networks that learn it: the logarithm of a step's variance on the way from its smallest (0) to its
    # largest (1) value, Nichol & Dhariwal 2021, equation 15; None: the sampler's own
    variance: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Prediction]
"""denoise(x (B, ...), sigma (B,)) -> Prediction"""


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """Shape (B,) values to multiply (B, ...) rows."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
