"""Adams-Bashforth steps on the slope eps = (x - x0) / sigma: LMS, DEIS and PNDM, one call of the network each.

They differ in the variable that the polynomial through the last slopes is one of: sigma, its logarithm, or the
count of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.multistep import kept, known, lowered, recall, refined, weights
from samplers.state import Denoise, Level, State, per_row


def lms(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Linear multistep of order 4 in sigma, for uneven steps: Hairer et al. 1993, section III.5 (k-diffusion's LMS)."""
    x, slopes, sigmas = _euler(denoise, state, now, next)
    nodes = sigmas.double() - sigmas[:, :1]
    power = torch.arange(1, nodes.shape[1] + 1, device=nodes.device)
    moments = (next.sigma.double() - now.sigma)[:, None] ** power / power
    return State(refined(x, slopes, weights(nodes, moments, known(sigmas))), kept(slopes, sigmas))


def deis(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """DEIS in its Adams-Bashforth form with polynomials in log rho: Zhang & Chen 2023, section 3; order 1 to 3.

    Options: solver_order; lower_order_final as in diffusers. A step to level 0 is first-order.
    """
    x, slopes, sigmas = _euler(denoise, state, now, next)
    points = lowered(known(sigmas).minimum(options["solver_order"].long()), now, next, options["lower_order_final"])
    nodes = (sigmas.double() / sigmas[:, :1]).log()
    moments = now.sigma.double()[:, None] * _moments((next.sigma.double() / now.sigma).log(), nodes.shape[1])
    return State(refined(x, slopes, weights(nodes, moments, points)), kept(slopes, sigmas))


def pndm(
    denoise: Denoise, state: State, now: Level, next: Level, noise: Tensor | None, options: dict[str, Tensor]
) -> State:
    """Pseudo linear multistep: Liu et al. 2022 (PNDM), equations 9 and 12, without Runge-Kutta steps before it.

    Slopes are weighed as if levels were even, and DDIM carries the row. Where the second level of a run comes
    twice, the first step is taken again with the mean of the slopes at its ends, as Stable Diffusion's PLMS begins.
    """
    x, slopes, sigmas = _euler(denoise, state, now, next)
    change = (next.sigma - now.sigma).double()[:, None]
    nodes = -torch.arange(slopes.shape[1], device=x.device).double().expand(len(x), -1)
    moments = 1 / (1 - nodes)
    moved = refined(x, slopes, change * weights(nodes, moments, known(sigmas)))

    again = (now.index == 1) & (now.sigma == next.sigma)
    whole = torch.where(again & (sigmas[:, 1] > 0), now.sigma - sigmas[:, 1], 0.0)
    mean = state.x + per_row(whole / 2, x) * (slopes[:, 0] - slopes[:, 1])
    memory = {
        name: torch.where(per_row(again, value), state.memory[name], value)
        for name, value in kept(slopes, sigmas).items()
    }
    return State(torch.where(per_row(again, x), mean, moved), memory)


def _euler(denoise: Denoise, state: State, now: Level, next: Level) -> tuple[Tensor, Tensor, Tensor]:
    """Euler's step, and the slopes and levels that correct it, newest first (B, P, ...) and (B, P)."""
    x0 = denoise(state.x, now.sigma).x0
    slopes, sigmas = recall(state, (state.x - x0) / per_row(now.sigma, x0), now)
    keep = per_row(next.sigma / now.sigma, x0)
    return keep * state.x + (1 - keep) * x0, slopes, sigmas


def _moments(end: Tensor, count: int) -> Tensor:
    """The integrals of e^u u^k from 0 to end (B,), for k < count: (B, count)."""
    moments = [end.expm1()]
    for k in range(1, count):
        moments.append(end**k * end.exp() - k * moments[-1])
    return torch.stack(moments, 1)
