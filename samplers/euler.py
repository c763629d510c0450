"""Euler's step, the first-order one, with noise before it or after it: pure functions of rows.

Without noise it is DDIM (Song et al. 2021a) and the Euler half of Karras et al. 2022, Algorithm 1. With eta 1 it
is DDPM (Ho et al. 2020, the small variance) and k-diffusion's ancestral Euler. Where estimates are not clipped they
differ in name alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.churn import churned
from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Euler with the churn of Karras et al. 2022, Algorithm 2 (without its second-order half), or with eta.

    A row that churns spends the step's noise on that: its eta counts as 0.
    """
    x, sigma = churned(state.x, now, noise, options)
    eta = eta_of(noise, options)
    if eta is not None:
        eta = torch.where(options["s_churn"] > 0, 0.0, eta)
    return State(_move(x, denoise(x, sigma).x0, sigma, next.sigma, noise, eta))


def ancestral(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Euler to a lower level and fresh noise after it, by eta: k-diffusion's ancestral Euler at 1."""
    x0 = denoise(state.x, now.sigma).x0
    return State(_move(state.x, x0, now.sigma, next.sigma, noise, eta_of(noise, options)))


def ddim(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DDIM with eta: Song et al. 2021a, equations 12 and 16, written in sigma.

    Options: eta; clip, the largest magnitude of an estimate of x0 (inf: none). The noise that is kept is what the
    network said before its estimate was clipped, as in diffusers.
    """
    x0 = denoise(state.x, now.sigma).x0
    limit = per_row(options["clip"], x0)
    down, up = split(now.sigma, next.sigma, eta_of(noise, options))
    moved = torch.clamp(x0, -limit, limit) + per_row(down / now.sigma, x0) * (state.x - x0)
    return State(moved if noise is None else moved + per_row(up, x0) * noise)


def eta_of(noise: Tensor | None, options: dict[str, Tensor]) -> Tensor | None:
    """Eta (B,) as `split` takes it: None where no noise is drawn, for then it is 0 of every row."""
    return None if noise is None else options["eta"]


def split(sigma: Tensor, sigma_next: Tensor, eta: Tensor | None) -> tuple[Tensor, Tensor]:
    """The level that a step goes down to, and the deviation of fresh noise that raises it again to sigma_next, (B,).

    down^2 + up^2 = sigma_next^2; up is k-diffusion's ancestral noise, eta sigma_next sqrt(1 - sigma_next^2 / sigma^2).
    eta (B,); None: 0 of every row, which gives the same to the last bit.
    """
    if eta is None:
        return sigma_next, torch.zeros_like(sigma_next)
    ratio = sigma_next / sigma
    fresh = (eta * (1 - ratio**2).clamp(min=0).sqrt()).clamp(max=1)
    left = (1 - eta) * (1 + eta) + (eta * ratio) ** 2  # 1 - fresh^2, which would lose its digits near eta 1
    return sigma_next * left.clamp(min=0).sqrt(), sigma_next * fresh


def _move(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None, eta: Tensor | None) -> Tensor:
    down, up = split(sigma, sigma_next, eta)
    keep = per_row(down / sigma, x)
    # x0 + down * (x - x0) / sigma, which stays exact however large sigma is
    moved = keep * x + (1 - keep) * x0
    return moved if noise is None else moved + per_row(up, x) * noise
