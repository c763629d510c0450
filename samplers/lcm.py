"""The step of consistency models, which are distilled to jump to the end of the path at once."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Multistep consistency sampling: Song et al. 2023, Algorithm 1; latent consistency, Luo et al. 2023, Algorithm 3.

    The estimate is noised to the next level: with eta 1 by fresh noise alone; below, by some of the noise that was
    there, the gamma-sampling of Kim et al. 2024 (CTM); with 0 it is DDIM. Option clip: the largest magnitude of an
    estimate (inf: none).
    """
    fresh = options["eta"].clamp(max=1)
    keep = per_row(next.sigma / now.sigma * (1 - fresh**2).sqrt(), state.x)
    limit = per_row(options["clip"], state.x)
    x = keep * state.x + (1 - keep) * torch.clamp(denoise(state.x, now.sigma).x0, -limit, limit)
    return State(x if noise is None else x + per_row(next.sigma * fresh, x) * noise)
