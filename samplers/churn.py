"""Churn: noise added before a step, which the step then takes away again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from samplers.state import Level, per_row


def churned(x: Tensor, now: Level, noise: Tensor | None, options: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows raised from their level, and the level they are raised to: Karras et al. 2022, Algorithm 2.

    Options, (B,): s_churn, spread over all steps of a run (0: off); s_tmin and s_tmax, the levels between which it
    holds; s_noise, the deviation of what is added. noise (B, ...) may be None where no row churns.
    """
    if noise is None:
        return x, now.sigma
    steps = now.index + now.steps_left
    gamma = (options["s_churn"] / steps).clamp(max=math.sqrt(2) - 1)
    held = (options["s_tmin"] <= now.sigma) & (now.sigma <= options["s_tmax"])
    raised = now.sigma * torch.where(held, 1 + gamma, 1.0)
    added = options["s_noise"] * (raised**2 - now.sigma**2).sqrt()
    return x + per_row(added, x) * noise, raised
