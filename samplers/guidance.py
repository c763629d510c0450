"""Guidance: estimates under several conditions, weighted into one per row.

Pure functions of what the denoiser returned; they know neither networks nor prompts. A row's weights sum to
one, so linear guidance on x0 is the same guidance on eps, v or a flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.scaling import Scaling
from samplers.state import per_row


def combine(x0: Tensor, weights: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Each row's weighted sum of M evaluations: (M, ...), weights (M,), rows (M,) -> (num_rows, ...)."""
    weighted = x0.float() * per_row(weights.float(), x0)
    return weighted.new_zeros(num_rows, *x0.shape[1:]).index_add(0, rows, weighted)


def cfg_terms(scale: float) -> dict[str, float]:
    """Classifier-free guidance as weights of conditions (Ho & Salimans 2022); 1 is off and needs no null.

    `scale` is diffusers' guidance_scale, 1 + w of the paper. A negative prompt takes the place of the null; in
    autoguidance (Karras et al. 2024) what a weaker network says of the prompt does.
    """
    return {"prompt": 1.0} if scale == 1 else {"null": 1.0 - scale, "prompt": scale}


def in_interval(sigma: Tensor, interval: tuple[float | Tensor, float | Tensor] | None) -> Tensor:
    """Where guidance holds, (B,) bool: low < sigma <= high (Kynkäänniemi et al. 2024); None: everywhere.

    The ends are numbers, or (B,) for each row its own.
    """
    if interval is None:
        return torch.ones_like(sigma, dtype=torch.bool)
    low, high = interval
    return (low < sigma) & (sigma <= high)


def rescale(guided: Tensor, prompt: Tensor, x: Tensor, sigma: Tensor, factor: Tensor, scaling: Scaling) -> Tensor:
    """Give guided (B, ...) the contrast it has under the prompt alone: Lin et al. 2024, section 3.4.

    The rule is one of the network's raw output, so the estimates of x0 go there and back. factor (B,) is
    diffusers' guidance_rescale, in [0, 1]; 0 is off.
    """
    output, reference = scaling.output(guided, x, sigma), scaling.output(prompt, x, sigma)
    axes = list(range(1, x.ndim))
    contrast = reference.std(axes, keepdim=True) / output.std(axes, keepdim=True)
    return scaling.x0(torch.lerp(output, output * contrast, per_row(factor, x)), x, sigma)


def zero_star(prompt: Tensor, null: Tensor, x: Tensor, sigma: Tensor, scale: Tensor, scaling: Scaling) -> Tensor:
    """CFG-Zero*: guidance away from the null's raw output, shrunk to lie nearest the prompt's (Fan et al. 2025).

    Estimates of x0 (B, ...) in and out; scale (B,) is diffusers' guidance_scale, 1 is off.
    """
    away, output = scaling.output(null, x, sigma), scaling.output(prompt, x, sigma)
    nearest = per_row(_dot(output, away) / _dot(away, away).clamp(min=1e-8), x)
    return scaling.x0(torch.lerp(nearest * away, output, per_row(scale, x)), x, sigma)


def zero_init(guided: Tensor, x: Tensor, sigma: Tensor, still: Tensor, scaling: Scaling) -> Tensor:
    """The zero-init of CFG-Zero*: rows in `still` (B,) bool, at their first steps, stay where they are.

    The raw output is 0 there (Fan et al. 2025), which is standing still where that is a flow's velocity.
    """
    return torch.where(per_row(still, x), scaling.x0(torch.zeros_like(x), x, sigma), guided)


@dataclass(frozen=True)
class Projection:
    """How `project` changes guidance, each (B,); the paper's settings for Stable Diffusion XL beside them."""

    parallel: Tensor  # how much stays of the part along the prompt's estimate, eta: 0; 1 keeps all
    limit: Tensor  # the largest norm of the difference, r: 15; inf is off
    momentum: Tensor  # what the differences of earlier calls count, beta: -0.5; 0 is off


def project(prompt: Tensor, null: Tensor, before: Tensor, scale: Tensor, how: Projection) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance: Sadat et al. 2024 (APG), which lets large scales saturate less.

    Estimates of x0 (B, ...) in and out; scale (B,) is diffusers' guidance_scale, 1 is off. The second value is the
    running difference, which the next call is to be given as `before`. It is zeros at a row's beginning and is kept
    with the row: `state.remember(momentum=...)`.
    """
    running = prompt - null + per_row(how.momentum, prompt) * before
    norm = _dot(running, running).sqrt()
    held = running * per_row((how.limit / norm.clamp(min=1e-12)).clamp(max=1), prompt)
    along = per_row(_dot(held, prompt) / _dot(prompt, prompt).clamp(min=1e-12), prompt) * prompt
    across = held - along
    return prompt + per_row(scale - 1, prompt) * (across + per_row(how.parallel, prompt) * along), running


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each row with its other, (B,)."""
    return (one * other).flatten(1).sum(1)
