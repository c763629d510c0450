"""Sheets: pictures side by side in one image, with words under them, to look at while training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def grid(pixels: Tensor, columns: int, captions: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] as rows of `columns` pictures, enlarged `scale` times, each over its caption."""
    array = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = (side * scale for side in array.shape[1:3])
    strip = 24 if captions else 0  # two lines of the default font
    rows = -(-len(array) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + strip)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for index, picture in enumerate(array):
        left, top = index % columns * width, index // columns * (height + strip)
        image = Image.fromarray(np.ascontiguousarray(picture))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if index < len(captions):
            letters = max(1, width // 5)
            text = captions[index]
            draw.text(
                (left + 1, top + height),
                f"{text[:letters]}\n{text[letters : 2 * letters]}",
                "black",
                font,
                spacing=1,
            )
    return sheet
