"""The Shapes data set as a stream of captioned pictures, ready for `write_folder` or `write_shards`.

Every fourth picture is a fresh scene and the three after it differ from it in one fact each: their shared group lets a
contrastive batch hold the hard negatives together. Of two objects the first two differ in the relation, which CLIP is
slowest to learn. Picture i of a seed is the same whatever the size of the set.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from training.data.shapes import Edit, caption, contrast, render, scene

EDITS: tuple[Edit, ...] = ("relation", "relation", "any")  # of the contrasts of a scene
GROUP_SIZE = 1 + len(EDITS)
_SEED_STRIDE = 1_000_000_007  # keeps the scene streams of neighbouring seeds apart


def shapes(num_pictures: int, seed: int = 0) -> Iterator[tuple[np.ndarray, str, str]]:
    """Yield (pixels (64, 64, 3) uint8, caption, group) for `num_pictures` training pictures."""
    for index in range(num_pictures):
        group, place = divmod(index, GROUP_SIZE)
        origin = scene(seed * _SEED_STRIDE + group * GROUP_SIZE)
        picture_seed = seed * _SEED_STRIDE + index
        picture = origin if place == 0 else contrast(origin, picture_seed, EDITS[place - 1])
        yield render(picture), caption(picture, picture_seed), f"{group:06d}"
