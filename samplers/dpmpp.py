"""DPM-Solver++: exponential steps on the estimate x0, exact in the linear part of the path.

Everything is written in sigma with h = log(sigma / sigma_next), where the paper's alphas cancel (as in k-diffusion).
Estimates and their levels travel with the row (`State.memory`), so rows at different levels share a step, and a
row that has no past yet (the first step of a run, or of a run from the middle) takes the first-order one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.multistep import kept, known, lowered, recall, refined, weights
from samplers.state import Denoise, Level, State, per_row


def multistep(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DPM-Solver++(2M) of Lu et al. 2022b, Algorithm 2, or (3M), by what is remembered; with eta 1 their SDE forms.

    Options: eta; lower_order_final and euler_at_final, diffusers' two reasons for a first-order last step.
    A step to level 0 is always first-order.
    """
    x0 = denoise(state.x, now.sigma).x0
    estimates, sigmas = recall(state, x0, now)
    points = lowered(known(sigmas), now, next, options["lower_order_final"])
    points = torch.where((next.steps_left == 0) & options["euler_at_final"].bool(), 1, points)

    ratio, rate = next.sigma / now.sigma, 1 + options["eta"]
    keep = per_row(ratio**rate, x0)  # exp(-h - eta h)
    x = keep * state.x + (1 - keep) * x0
    x = refined(x, estimates, exponential_weights(now.sigma, sigmas, next.sigma, rate, points))
    if noise is not None:
        fresh = (1 - ratio ** (2 * options["eta"])).sqrt()
        x = x + per_row(next.sigma * fresh, x) * noise
    return State(x, kept(estimates, sigmas))


def singlestep(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DPM-Solver++(2S): Lu et al. 2022b, Algorithm 1, over pairs of steps, as diffusers' Singlestep solver.

    The first step of a pair is first-order; the second goes over the whole pair from where the first began, which
    the row remembers. An even run ends with two single steps where its last level is 0 or lower_order_final is on.
    """
    x0 = denoise(state.x, now.sigma).x0
    begun, sigma = state.memory["x"], state.memory["sigma"]
    single = (next.steps_left == 0) & ((next.sigma == 0) | options["lower_order_final"].bool())
    paired = (now.index % 2 == 1) & (sigma[:, 0] > 0) & ~single

    origin = torch.where(paired, sigma[:, 0], now.sigma)
    first = torch.where(per_row(paired, x0), state.memory["past"][:, 0], x0)
    keep = per_row(next.sigma / origin, x0)
    x = keep * torch.where(per_row(paired, x0), begun, state.x) + (1 - keep) * first
    estimates, sigmas = torch.stack([first, x0], 1), torch.stack([origin, now.sigma], 1)
    x = refined(x, estimates, exponential_weights(origin, sigmas, next.sigma, torch.ones_like(origin), 1 + paired))
    return State(x, {"past": x0[:, None], "sigma": now.sigma[:, None], "x": state.x})


def exponential_weights(
    sigma: Tensor,  # (B,) where the step begins
    sigmas: Tensor,  # (B, P) the levels of the estimates; the first is sigma
    sigma_next: Tensor,  # (B,)
    rate: Tensor,  # (B,) 1 of the ODE, 1 + eta of the SDE
    points: Tensor,  # (B,) estimates in use
    linear: Tensor | None = None,  # (B,) bool, where B(h) is h and not 1 - exp(-rate h); None: nowhere
) -> Tensor:
    """Weights (B, P) of estimates in rate * integral of exp(-rate (h - u)) x0(u) over a step of h, in float64.

    With two points the rule is the midpoint's, half of B(h), as Lu et al. 2022b and Zhao et al. 2023 have it; with
    more the polynomial is integrated exactly.
    """
    h = (sigma.double() / sigma_next).log()
    nodes = (sigma.double()[:, None] / sigmas).log()  # of log SNR, counted from the step's beginning
    moments = [-(-rate * h).expm1()]
    for k in range(1, nodes.shape[1]):
        moments.append(h**k - k / rate * moments[-1])
    size = moments[0] if linear is None else torch.where(linear, h, moments[0])
    midpoint = torch.zeros_like(nodes)
    midpoint[:, 1] = 0.5 * size * h / nodes[:, 1]
    return torch.where((points == 2)[:, None], midpoint, weights(nodes, torch.stack(moments, 1), points))
