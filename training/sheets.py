"""What a task shows a person: its tensors as pictures, and pictures over their captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from gen.answer import as_pillow
from gen.sheet import contact_sheet


def pictures_of(pixels: Tensor) -> list[Image.Image]:
    """Pixels (N, 3, H, W), of 8 bits or in [0, 1], as Pillow's pictures."""
    return as_pillow(pixels / 255 if pixels.dtype == torch.uint8 else pixels.float().clamp(0, 1))


def captioned(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Eight pictures in a row, each over its caption, which may be as long as the longest of Shapes."""
    return contact_sheet(pictures, captions, columns=8, num_lines=3)
