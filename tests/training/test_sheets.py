"""What a task shows is what it has."""

import numpy as np
import pytest
import torch

from training.sheets import captioned, pictures_of
from training.vae_task import to_signed


def test_pictures_are_their_tensors_of_any_range() -> None:
    levels = torch.randint(0, 256, (3, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for pixels in (levels, levels.float() / 255, to_signed(levels) / 2 + 0.5):
        shown = np.stack([np.asarray(picture) for picture in pictures_of(pixels)])
        assert np.array_equal(shown, levels.permute(0, 2, 3, 1).numpy())
    beyond = pictures_of(torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert [picture.getpixel((0, 0)) for picture in beyond] == [(0, 0, 0), (255, 255, 255)]


def test_each_picture_has_its_caption() -> None:
    pictures = pictures_of(torch.zeros(9, 3, 64, 64))
    sheet = captioned(pictures, ["a star"] * 9)
    assert sheet.width > 8 * 64 and sheet.height > 2 * 64
    with pytest.raises(ValueError, match="one caption per picture"):
        captioned(pictures, ["a star"])
