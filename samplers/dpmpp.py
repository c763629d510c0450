"""DPM-Solver++ (2M) and its SDE form: second order from one call of the network and the estimate before it.

The estimate and its level travel with the row (`State.memory`), so rows at different levels share a step, and
a row that has no past yet (the first step of a run, or of a run from the middle) takes the first-order one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.state import Denoise, Level, State, per_row

FEW_STEPS = 15  # diffusers' lower_order_final holds for runs shorter than this


def step(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DPM-Solver++(2M): Lu et al. 2022b, Algorithm 2; with eta 1 their SDE-DPM-Solver++(2M). Both midpoint.

    Written in sigma, with h = log(sigma / sigma_next), where the paper's alphas cancel (as in k-diffusion).
    Options: eta; lower_order_final and euler_at_final, diffusers' two reasons for a first-order last step.
    A step to level 0 is always first-order.
    """
    x0 = denoise(state.x, now.sigma).x0
    ratio = next.sigma / now.sigma
    keep = per_row(ratio ** (1 + options["eta"]), x0)  # exp(-h - eta h)
    change = per_row(_extrapolation(state, now, next, options), x0) * (x0 - state.memory["x0"])

    x = keep * state.x + (1 - keep) * (x0 + 0.5 * change)
    if noise is not None:
        fresh = (1 - ratio ** (2 * options["eta"])).sqrt()
        x = x + per_row(next.sigma * fresh, x) * noise
    return State(x, {"x0": x0, "sigma": now.sigma})


def _extrapolation(state: State, now: Level, next: Level, options: dict[str, Tensor]) -> Tensor:
    """How many times the last change of x0 is added, (B,): h / h_before, or 0 for a first-order step."""
    before = state.memory["sigma"]
    at_end = next.steps_left == 0
    few = now.index + now.steps_left < FEW_STEPS
    lowered = at_end & ((options["lower_order_final"].bool() & few) | options["euler_at_final"].bool())
    first_order = (before == 0) | (next.sigma == 0) | lowered
    return torch.where(first_order, 0.0, (now.sigma / next.sigma).log() / (before / now.sigma).log())
