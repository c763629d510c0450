"""Pictures warped and blurred at random, as a decoder that is not sure paints them.

CLIP ranks painted pictures, so it should have seen outlines as soft as theirs. Knows no CLIP and no captions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

CELL = 8  # pixels between the points that are pushed about
FURTHEST = 2.5  # standard deviation of a point's way in the most warped picture, pixels
WIDEST = 2.0  # standard deviation of the blur in the most blurred picture, pixels


def soften(pixels: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """(B, 3, H, W) in [0, 1], of which about `share` in [0, 1] are warped and blurred, each by its own amounts.

    A smooth random displacement (Simard et al. 2003, elastic distortions), then a step of random length towards the
    blurred picture. All randomness comes from `rng`.
    """
    batch, _, height, width = pixels.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=rng.device).to(pixels)

    chosen = (draw(batch) < share).to(pixels)
    warp, blur = chosen * draw(batch), chosen * draw(batch)
    grid = (batch, 2, height // CELL + 1, width // CELL + 1)
    points = torch.randn(grid, generator=rng, device=rng.device).to(pixels)
    ways = (
        F.interpolate(points, (height, width), mode="bicubic", align_corners=True) * FURTHEST * warp.view(-1, 1, 1, 1)
    )
    still = F.affine_grid(torch.eye(2, 3).to(pixels).expand(batch, 2, 3), list(pixels.shape), align_corners=False)
    to = still + ways.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height]).to(pixels)
    warped = F.grid_sample(pixels, to, padding_mode="border", align_corners=False)
    reach = 2 * int(2 * WIDEST) + 1
    return torch.lerp(warped, gaussian_blur(warped, [reach, reach], [WIDEST, WIDEST]), blur.view(-1, 1, 1, 1))
