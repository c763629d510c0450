"""DPM-Solver-2: second order from the slope half way, which asks the network twice; a pure function of rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from samplers.euler import eta_of, split
from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DPM-Solver-2 with its middle at half the log SNR: Lu et al. 2022a, Algorithm 1 (k-diffusion's DPM2).

    With eta 1 it is k-diffusion's ancestral form: the same step to a lower level, and fresh noise after it. A row
    that goes down to 0 takes Euler's step; in the second call it is asked again where it stood.
    """
    x = state.x
    down, up = split(now.sigma, next.sigma, eta_of(noise, options))
    ratio = down / now.sigma
    half = per_row(ratio.sqrt(), x)
    first = denoise(x, now.sigma).x0
    euler = per_row(ratio, x) * x + (1 - per_row(ratio, x)) * first
    middle = half * x + (1 - half) * first

    last = per_row(down == 0, x)
    second = denoise(torch.where(last, x, middle), torch.where(down == 0, now.sigma, now.sigma * ratio.sqrt())).x0
    # (down - sigma) times the change of slope, (first - second) / (sigma sqrt(ratio))
    correction = (1 - half**2) / torch.where(last, 1.0, half) * (second - first)
    moved = torch.where(last, euler, euler + correction)
    return State(moved if noise is None else moved + per_row(up, x) * noise)


def middle(sigma: float, sigma_next: float, options: Mapping[str, float]) -> float:
    """The level of a step's second question: half way in log SNR, or where it began if it goes down to 0."""
    down, _ = split(*torch.tensor([sigma, sigma_next, options["eta"]], dtype=torch.float64))
    return float(sigma * (down / sigma).sqrt()) if down > 0 else sigma
