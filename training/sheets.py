"""What a task shows a person: its tensors as pictures, and pictures over their captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from gen.sheet import contact_sheet


def pictures_of(pixels: Tensor) -> list[Image.Image]:
    """Pixels (N, 3, H, W), of 8 bits or in [0, 1], as Pillow's pictures."""
    levels = pixels if pixels.dtype == torch.uint8 else (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def captioned(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Eight pictures in a row, each over its caption, which may be as long as the longest of Shapes."""
    return contact_sheet(pictures, captions, columns=8, num_lines=3)
