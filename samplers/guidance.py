"""Guidance: estimates under several conditions, weighted into one per row.

Pure functions of what the denoiser returned; they know neither networks nor prompts. A row's weights sum to
one, so linear guidance on x0 is the same guidance on eps, v or a flow.
"""

from __future__ import annotations

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

    `scale` is diffusers' guidance_scale, 1 + w of the paper. A negative prompt takes the place of the null.
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
