"""What a vision transformer starts from, so that it soon tells shapes and places apart.

Started as usual, with filters and positions that are small noise, the image tower of a small CLIP learned how much of
which colour there is and stayed blind to outlines and places. Knows no CLIP and no data, only weights and pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

AMPLITUDE = 0.5  # of position embeddings, and standard deviation of a filter's answers
_FLOOR = 1e-3  # added to variances: what varies less than this is noise and is not brought up


@torch.no_grad()
def place_patches_(weight: Tensor) -> None:
    """Position embeddings (1 + side * side, D) become sines and cosines of row and column; the class token's stays.

    As the fixed ones of Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k", but they go on learning.
    """
    side, quarter = round((len(weight) - 1) ** 0.5), weight.shape[1] // 4
    rates = 10_000.0 ** -(torch.arange(quarter) / max(1, quarter - 1))
    angles = torch.arange(side)[:, None] * rates  # (side, D / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    weight[1:, : 4 * quarter] = AMPLITUDE * torch.cat([rows, columns], dim=-1).flatten(0, 1)


@torch.no_grad()
def whiten_patches_(weight: Tensor, pictures: Tensor) -> None:
    """Patch filters (D, 3, P, P) become the principal components of the patches of preprocessed (N, 3, H, W).

    Each is scaled to answer with the same variance. An outline changes few pixels of a patch, and would drown in its
    plain colour (Page 2019, "How to train your ResNet 8: bag of tricks", whitens a first convolution so). Filters
    beyond 3 * P * P stay as they are; of more components than filters the largest are taken.
    """
    size = weight.shape[-1]
    patches = F.unfold(pictures, size, stride=size).transpose(1, 2).flatten(0, 1)  # (N', 3 * P * P)
    variance, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (components * (variance.clamp(min=0) + _FLOOR).rsqrt()).T.flip(0)[: len(weight)]
    weight[: len(filters)] = AMPLITUDE * filters.unflatten(1, weight.shape[1:])
