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
    """Weights (B, P) that integrate the polynomial through the first `points` (B,) of the nodes (B, P), float64.

    moments (B, P) are the integrals of 1, u, u^2, ... Newton's form: the sum over k < points of the divided
    difference f[u_0 .. u_k] times the integral of (u - u_0) ... (u - u_{k-1}), the `basis`.
    """
    total = torch.zeros_like(nodes)
    basis = torch.zeros_like(nodes)  # coefficients of 1, u, u^2, ...
    basis[:, 0] = 1
    for k in range(nodes.shape[1]):
        first = slice(0, k + 1)
        integral = (basis[:, first] * moments[:, first]).sum(1)
        gaps = nodes[:, first, None] - nodes[:, None, first] + torch.eye(k + 1, dtype=nodes.dtype, device=nodes.device)
        share = integral[:, None] / gaps.prod(2)  # f[u_0 .. u_k] = sum_j f_j / prod_{i != j} (u_j - u_i)
        total[:, first] += torch.where((k < points)[:, None], share, 0.0)
        basis = torch.cat([torch.zeros_like(basis[:, :1]), basis[:, :-1]], 1) - nodes[:, k, None] * basis
    return total


def refined(x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """First-order rows x (B, ...) and what the other estimates change: sum_j w_j (values_j - values_0)."""
    for j in range(1, values.shape[1]):
        x = x + per_row(weights[:, j].to(x.dtype), x) * (values[:, j] - values[:, 0])
    return x
