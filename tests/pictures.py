"""Pictures and masks as people hand them in, and what two paintings of one picture may differ by."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZE = (48, 80)  # height and width, not the tiny models' own
LEVEL = 1 / 255  # one 8-bit level of pixels from 0 to 1; EIGHT_BIT_LEVEL of tests/stock.py is of those from 0 to 255


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise of this height and width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """The same of this width and height, as Pillow counts."""
    return picture(seed, size[::-1])


def mask(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = (13, 20, 43, 60)) -> Image.Image:
    """White within top, left, bottom, right; grey in one row, which is white from 128 on."""
    pixels = np.zeros(size, dtype=np.uint8)
    top, left, bottom, right = box
    pixels[top:bottom, left:right] = 255
    pixels[-1] = 127
    return Image.fromarray(pixels)
