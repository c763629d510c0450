"""What multistep samplers share: a row's past, and the weights of its estimates in the integral over a step.

A step integrates the polynomial through a row's last estimates. Rows with pasts of different length share it: a
row uses its newest `points` estimates, and the weights of the others are 0. Weights are worked out in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.state import Level, State, per_row

FEW_STEPS = 15  # diffusers' lower_order_final holds for runs shorter than this


def recall(state: State, estimate: Tensor, now: Level) -> tuple[Tensor, Tensor]:
    """This step's estimate (B, ...) and those before it, newest first (B, P, ...), and their levels (B, P).

    P is one more than the state has room for; the newest that fit are to be remembered: `kept`.
    """
    values = torch.cat([estimate[:, None], state.memory["past"]], 1)
    return values, torch.cat([now.sigma[:, None], state.memory["sigma"]], 1)


def kept(values: Tensor, sigmas: Tensor) -> dict[str, Tensor]:
    """The memory of the next step."""
    return {"past": values[:, :-1], "sigma": sigmas[:, :-1]}


def known(sigmas: Tensor) -> Tensor:
    """How many estimates a row has, (B,): level 0 marks an empty place."""
    return (sigmas > 0).sum(1)


def lowered(points: Tensor, now: Level, next: Level, lower_order_final: Tensor) -> Tensor:
    """Fewer points at the end of a short run, (B,): diffusers' lower_order_final; one on the way to level 0."""
    few = lower_order_final.bool() & (now.index + now.steps_left < FEW_STEPS)
    points = torch.where(few, points.minimum(now.steps_left), points)
    return torch.where(next.sigma == 0, 1, points)


def weights(nodes: Tensor, moments: Tensor, points: Tensor) -> Tensor:
    """Weights (B, P) that integrate every polynomial through the first `points` (B,) of the nodes (B, P).

    The method of undetermined coefficients: sum_j w_j u_j^k = moments_k for k < points, the integral of u^k.
    """
    power = torch.arange(nodes.shape[1], device=nodes.device)
    used = power < points[:, None]  # (B, P)
    system = nodes[:, None, :] ** power[:, None]  # (B, k, j)
    system = torch.where(used[:, :, None] & used[:, None, :], system, torch.eye(len(power)).to(system))
    asked = torch.where(used, moments, 0.0)
    # no check of singularity, which would wait for the device; nodes are different levels
    return torch.linalg.solve_ex(system, asked[:, :, None]).result[:, :, 0]


def refined(x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """First-order rows x (B, ...) and what the other estimates change: sum_j w_j (values_j - values_0)."""
    for j in range(1, values.shape[1]):
        x = x + per_row(weights[:, j].to(x.dtype), x) * (values[:, j] - values[:, 0])
    return x
