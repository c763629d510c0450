"""Leads a UNet's middle features towards what a frozen CLIP sees in the clean picture; thrown away after training.

Painting well from noise needs features that say what is where; CLIP has them already, so learning them from it is
quicker than finding them anew (Yu et al. 2025, "Representation Alignment for Generation", REPA). It knows no data.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F


class Aligned(nn.Module):
    """A UNet and, with `width`, a small network from its middle features to CLIP's patch tokens of that width."""

    def __init__(self, unet: UNet2DConditionModel, width: int | None) -> None:
        super().__init__()
        self.unet = unet
        self.head: nn.Module | None = None
        self.middle: Tensor | None = None  # what the middle block gave last, (B, C, h, w)
        if width is not None:
            channels = unet.config.block_out_channels[-1]
            self.head = nn.Sequential(nn.Conv2d(channels, 2 * width, 1), nn.SiLU(), nn.Conv2d(2 * width, width, 1))
            unet.mid_block.register_forward_hook(self._keep)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The UNet's output (B, C, h, w) and, with a head, what it thinks CLIP sees: (B, width, h', w')."""
        output = self.unet(*args, **kwargs).sample
        if self.head is None:
            return output, None
        assert self.middle is not None
        middle, self.middle = self.middle, None
        return output, self.head(middle)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.middle = output


def misalignment(seen: Tensor, patches: Tensor) -> Tensor:
    """1 - cosine between (B, E, h, w), brought to the size of the patches' grid, and (B, side * side, E); a scalar."""
    side = round(patches.shape[1] ** 0.5)
    there = F.interpolate(seen.float(), (side, side), mode="bilinear").flatten(2).transpose(1, 2)  # (B, P, E)
    return 1 - torch.cosine_similarity(there, patches.float(), dim=-1).mean()
