"""Denoisers made of denoisers: what is done to every estimate, whoever asks for it.

Each takes `denoise` and gives another of its signature, so samplers and whatever wraps them again do not notice.
They know neither networks nor prompts; settings are (B,), each row its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samplers.state import Denoise, Prediction, per_row

Score = Callable[[Tensor], Tensor]
"""score(x0 (B, ...)) -> (B,), the higher the better; differentiable, each row by itself"""


def thresholded(
    denoise: Denoise, percentile: Tensor, highest: Tensor | None = None, bound: Tensor | None = None
) -> Denoise:
    """Dynamic thresholding: Saharia et al. 2022 (Imagen), section 2.3.

    A row is clipped to what `percentile` (B,) of its magnitudes lie below, at least its `bound` (B,) and at most
    `highest` (B,) (None: no end), and scaled so that this becomes the bound. percentile is in [0, 1]; 0 is off. The
    bound is what clean values keep within: 1 (None) of pixels in [-1, 1], and the caller's to know of latents.
    """

    def threshold(x: Tensor, sigma: Tensor) -> Prediction:
        prediction = denoise(x, sigma)
        x0 = prediction.x0
        least = torch.ones_like(percentile) if bound is None else bound
        limit = _percentile(x0.abs().flatten(1), percentile).maximum(least)
        limit = limit if highest is None else limit.minimum(highest)
        clipped = torch.clamp(x0, -per_row(limit, x0), per_row(limit, x0)) * per_row(least / limit, x0)
        return Prediction(torch.where(per_row(percentile > 0, x0), clipped, x0), prediction.variance)

    return threshold


def score_guided(denoise: Denoise, score: Score, scale: Tensor) -> Denoise:
    """Guidance by the gradient of a score of the estimate, such as CLIP's: Nichol et al. 2022 (GLIDE), section 2.4.

    The score stands for the logarithm of a probability. Its gradient at x moves the estimate by sigma^2 times it
    (Dhariwal & Nichol 2021, section 4). Here it is taken at the estimate (Bansal et al. 2023) and carried to x by
    the spread of x0 given x where clean values have variance 1, sigma^2 / (1 + sigma^2) (Song et al. 2023, PiGDM): a
    network's own slope there is not near the true one at high levels, where sigma^2 would blow that up. scale (B,), 0
    is off. No gradient goes through the denoiser; under torch.no_grad this works too.
    """

    def climb(x: Tensor, sigma: Tensor) -> Prediction:
        prediction = denoise(x, sigma)
        with torch.enable_grad():
            at = prediction.x0.detach().requires_grad_()
            (slope,) = torch.autograd.grad(score(at).sum(), at)
        spread = 1 / (1 + sigma**-2)
        moved = prediction.x0 + per_row(scale * spread, x) * slope
        return Prediction(torch.where(per_row(scale == 0, x), prediction.x0, moved), prediction.variance)

    return climb


def _percentile(values: Tensor, share: Tensor) -> Tensor:
    """What `share` (B,) of a row's values (B, N) lie below, between two of them as torch.quantile has it: (B,)."""
    place = share * (values.shape[1] - 1)
    below = place.floor()
    ranked = values.sort(1).values
    low, high = (ranked.gather(1, index.long()[:, None])[:, 0] for index in (below, place.ceil()))
    return torch.lerp(low, high, place - below)
