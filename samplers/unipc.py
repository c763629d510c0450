"""UniPC: a multistep predictor, and a corrector that makes use of its network call; one call a step."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.dpmpp import exponential_weights
from samplers.multistep import kept, known, recall, refined
from samplers.state import Denoise, Level, State, per_row


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """UniPC on x0: Zhao et al. 2023, Algorithms 1 and 2 in their data-prediction form, of order 1 to 3.

    The estimate made here first corrects the step that led here (UniC), for which the row remembers where that
    step began, and then predicts the next (UniP). Options: solver_order; bh1, 1 where B(h) = h and 0 where it is
    exp(h) - 1; lower_order_final, an order no higher than the steps left. A step to level 0 is first-order.
    """
    x0 = denoise(state.x, now.sigma).x0
    estimates, sigmas = recall(state, x0, now)
    count = known(sigmas)
    bh1 = options["bh1"].bool()

    # UniC-p of the step before goes from the level before, through its estimates and the one made here
    def swapped(known: Tensor) -> Tensor:
        return torch.cat([known[:, 1:2], known[:, :1], known[:, 2:]], dim=1)

    points = 1 + _order(count - 1, now.steps_left + 1, options)
    correct = _carry(state.memory["x"], swapped(estimates), swapped(sigmas), now.sigma, points, bh1)
    x = torch.where(per_row(count > 1, x0), correct, state.x)

    points = torch.where(next.sigma == 0, 1, _order(count, now.steps_left, options))
    return State(_carry(x, estimates, sigmas, next.sigma, points, bh1), {**kept(estimates, sigmas), "x": x})


def _order(count: Tensor, steps_left: Tensor, options: dict[str, Tensor]) -> Tensor:
    """The order of a step, (B,), with so many estimates known and so many steps left before it."""
    order = count.minimum(options["solver_order"].long())
    return torch.where(options["lower_order_final"].bool(), order.minimum(steps_left), order)


def _carry(x: Tensor, estimates: Tensor, sigmas: Tensor, sigma_next: Tensor, points: Tensor, bh1: Tensor) -> Tensor:
    """Rows from the level of their first estimate to sigma_next (B,); NaN where that level is 0, an empty place."""
    sigma = sigmas[:, 0]
    keep = per_row(sigma_next / sigma, x)
    first = keep * x + (1 - keep) * estimates[:, 0]
    return refined(
        first, estimates, exponential_weights(sigma, sigmas, sigma_next, torch.ones_like(sigma), points, bh1)
    )
