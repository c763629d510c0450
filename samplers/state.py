"""Rows: what a sampler is given and what it gives back.

A row is one picture in the making. Every tensor here has the row as its first axis, so rows of many requests,
at different noise levels, share a step, and `select` and `cat` are right for every sampler. There is one
convention: x = x0 + sigma * eps, in float32. Nothing here knows networks, prompts or what pixels mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Past estimates of x0 that each sampler extrapolates from; the names are those of `samplers.sample.SAMPLERS`.
HISTORY = {
    "ddim": 0,
    "ddpm": 0,
    "dpmpp_2m": 1,
    "dpmpp_2m_sde": 1,
    "euler": 0,
    "euler_ancestral": 0,
    "heun": 0,
}


@dataclass(frozen=True)
class State:
    """The noisy rows and what their sampler remembers of them."""

    x: Tensor  # (B, ...) float32, x0 + sigma * eps
    memory: dict[str, Tensor] = field(default_factory=dict)  # every value (B, ...)

    def select(self, rows: Tensor) -> State:
        """The rows that go on: indices (K,) in any order, or a mask (B,)."""
        return State(self.x[rows], {name: value[rows] for name, value in self.memory.items()})

    def cat(self, other: State) -> State:
        """These rows, then the other's; both must be of samplers that remember the same things."""
        assert self.memory.keys() == other.memory.keys(), "rows of samplers with different memories"
        memory = {name: torch.cat([value, other.memory[name]]) for name, value in self.memory.items()}
        return State(torch.cat([self.x, other.x]), memory)


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
    variance: Tensor | None = None  # (B, ...) of networks that learn it; None: the sampler's own


Denoise = Callable[[Tensor, Tensor], Prediction]
"""denoise(x (B, ...), sigma (B,)) -> Prediction"""


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """Shape (B,) values to multiply (B, ...) rows."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def start(sampler: str, noise: Tensor, scale: Tensor) -> State:
    """Rows of pure noise: unit noise (B, ...) times each row's `Schedule.start_scale` (B,)."""
    return _fresh(sampler, noise.float() * per_row(scale.float(), noise))


def start_from(sampler: str, x0: Tensor, noise: Tensor, sigma: Tensor) -> State:
    """Rows that begin at a clean picture noised to sigma (B,): SDEdit (Meng et al. 2022), img2img."""
    return _fresh(sampler, x0.float() + noise.float() * per_row(sigma.float(), noise))


def _fresh(sampler: str, x: Tensor) -> State:
    if sampler not in HISTORY:
        raise ValueError(f"sampler {sampler!r} is unknown; choose from: {', '.join(sorted(HISTORY))}")
    if not HISTORY[sampler]:
        return State(x)
    # sigma 0 marks an empty place: no estimate is ever made there
    return State(x, {"x0": torch.zeros_like(x), "sigma": x.new_zeros(len(x))})
