"""DDPM's ancestral step, of networks that may learn how much noise to add (DALL-E 2, Karlo, Kandinsky)."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.euler import split
from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DDPM (Ho et al. 2020, equation 7) with the learned variance of Nichol & Dhariwal 2021, equation 15.

    Options: clip, the largest magnitude of an estimate of x0 (inf: none); eta, 0 without noise, 1 all of it; learned,
    1 where the prediction's own variance counts. Else it is the smallest. A step to level 0 adds none.
    """
    prediction = denoise(state.x, now.sigma)
    limit = per_row(options["clip"], state.x)
    x0 = torch.clamp(prediction.x0, -limit, limit)
    down, up = split(now.sigma, next.sigma, options["eta"])
    keep = per_row(down / now.sigma, x0)
    x = keep * state.x + (1 - keep) * x0
    if noise is None:
        return State(x)
    deviation = per_row(up, x)
    if prediction.variance is not None:
        share = per_row(options["learned"], x) * prediction.variance
        deviation = deviation * per_row(_widest(now.sigma, next.sigma), x) ** share
    return State(x + deviation * noise)


def _widest(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The largest deviation over the smallest, (B,): the root of beta over its posterior's, in Ho et al.'s words.

    That is sqrt((1 - alpha_bar) / (1 - alpha_bar_next)), where 1 / alpha_bar = 1 + sigma^2.
    """
    last = sigma_next == 0
    share = sigma / torch.where(last, sigma, sigma_next)
    return share * ((1 + sigma_next**2) / (1 + sigma**2)).sqrt()
