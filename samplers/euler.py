"""Euler's step, the first-order one, with eta of noise: a pure function of rows.

With eta 0 it is DDIM (Song et al. 2021a) and the Euler half of Karras et al. 2022, Algorithm 1; with eta 1 it
is DDPM (Ho et al. 2020, the small variance) and k-diffusion's ancestral Euler. They differ in name alone.
"""

from __future__ import annotations

from torch import Tensor

from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DDIM with eta: Song et al. 2021a, equations 12 and 16, written in sigma.

    The level is brought down to `down` and raised again by fresh noise of deviation `up`, up^2 + down^2 =
    sigma_next^2; their `up` is eta sigma_next sqrt(1 - sigma_next^2 / sigma^2).
    """
    ratio = next.sigma / now.sigma
    fresh = (options["eta"] * (1 - ratio**2).clamp(min=0).sqrt()).clamp(max=1)  # up / sigma_next
    keep = per_row(ratio * (1 - fresh**2).sqrt(), state.x)  # down / sigma

    # x0 + down * (x - x0) / sigma, which stays exact however large sigma is
    x = keep * state.x + (1 - keep) * denoise(state.x, now.sigma).x0
    if noise is not None:
        x = x + per_row(next.sigma * fresh, x) * noise
    return State(x)
