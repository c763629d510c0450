"""Inpainting by a network that knows nothing of it: part of a picture is held while the rest is painted.

The network is shown the known part at the level it is asked at, by one noise all the way, and its estimate of that
part is the known one: Lugmayr et al. 2022 (RePaint), equation 8, without going back and forth. What a sampler makes of
the known part of x is then never seen, so this is right for every sampler. It knows neither networks nor masks' files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.state import Denoise, Prediction, per_row


@dataclass(frozen=True)
class KnownRegions:
    """What is known of some rows."""

    clean: Tensor  # (B, ...)
    noise: Tensor  # (B, ...) unit noise that it is shown under
    is_painted: Tensor  # (B, ...) bool, False where it is held
    below: Tensor  # (B,) the row's first level: there x is shown as it started; below it what is known replaces x


def inpainting(denoise: Denoise, rows: KnownRegions) -> Denoise:
    """The denoiser of rows of which a part is known."""

    def hold(x: Tensor, sigma: Tensor) -> Prediction:
        free = rows.is_painted | per_row(sigma >= rows.below, x)
        shown = torch.where(free, x, rows.clean + per_row(sigma, x) * rows.noise)
        prediction = denoise(shown, sigma)
        return Prediction(torch.where(rows.is_painted, prediction.x0, rows.clean), prediction.variance)

    return hold
