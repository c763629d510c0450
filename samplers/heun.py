"""Heun's step, the second-order one that asks the network twice: a pure function of rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from samplers.churn import churned
from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Heun's method: Karras et al. 2022, Algorithm 1, and with s_churn above 0 their Algorithm 2.

    A row whose next level is 0 takes Euler's step; in the second call it is asked again where it stood, so
    the batch keeps its shape and nothing waits for the device.
    """
    x, sigma = churned(state.x, now, noise, options)
    ratio = per_row(next.sigma / sigma, x)
    first = denoise(x, sigma).x0
    euler = ratio * x + (1 - ratio) * first

    last = per_row(next.sigma == 0, x)
    second = denoise(torch.where(last, x, euler), torch.where(next.sigma == 0, sigma, next.sigma)).x0
    # half the change of slope times the step: (sigma_next - sigma) / 2 * (d' - d), where d' - d is
    # (first - second) / sigma_next since the Euler point lies on the first slope
    correction = 0.5 * (1 / torch.where(last, 1.0, ratio) - 1) * (second - first)
    return State(torch.where(last, euler, euler + correction))


def end(sigma: float, sigma_next: float, options: Mapping[str, float]) -> float:
    """The level of a step's second question: where it goes to, or where it began (unchurned) if that is 0."""
    return sigma_next if sigma_next > 0 else sigma
