"""Heun's step, the second-order one that asks the network twice: a pure function of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Heun's method on the probability-flow ODE: Karras et al. 2022, Algorithm 1.

    A row whose next level is 0 takes Euler's step; in the second call it is asked again where it stood, so
    the batch keeps its shape and nothing waits for the device.
    """
    x, ratio = state.x, per_row(next.sigma / now.sigma, state.x)
    first = denoise(x, now.sigma).x0
    euler = ratio * x + (1 - ratio) * first

    last = per_row(next.sigma == 0, x)
    second = denoise(torch.where(last, x, euler), torch.where(next.sigma == 0, now.sigma, next.sigma)).x0
    # half the change of slope times the step: (sigma_next - sigma) / 2 * (d' - d), where d' - d is
    # (first - second) / sigma_next since the Euler point lies on the first slope
    correction = 0.5 * (1 / torch.where(last, 1.0, ratio) - 1) * (second - first)
    return State(torch.where(last, euler, euler + correction))
