"""Captioned pictures as a data set, wherever they are stored.

Owns reading, skipping and counting what cannot be used, and naming the content by a digest. Where examples come from is
`folder.py`'s and `shards.py`'s. Knows nothing of networks.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from gen.picture import turn_of, upright
from training.data.examples import DataError, Example, Skipped
from training.data.folder import METADATA_NAMES, read_folder
from training.data.shards import read_shards

logger = logging.getLogger(__name__)

# what Pillow and the decoders under it raise on damaged files, and on pictures too large to be meant
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Pictures(Dataset[tuple[Tensor, str]]):
    """The usable examples of an image folder or of shards: item i is (pixels (3, H, W) uint8, caption).

    Every picture is opened once at the start, so a damaged file is found before training and not in the night.
    `resolution` crops to the centre square and resizes to that many pixels.

    Raises DataError when the folder holds no data or none of it is usable.
    """

    def __init__(self, folder: str | Path, resolution: int) -> None:
        self.folder = Path(folder)
        self.resolution = resolution
        self.skipped = Skipped()
        digest = hashlib.sha256(str(resolution).encode())
        found = find_examples(self.folder, self.skipped)
        self.examples = [example for example in found if self._usable(example, digest)]
        if not self.examples:
            raise DataError(f"no usable picture in {self.folder}: {self.skipped if self.skipped.counts else 'no rows'}")
        if self.skipped.counts:
            logger.warning("%s: %s", self.folder, self.skipped)
        self.digest = digest.hexdigest()  # of every used picture and caption, in order

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        example = self.examples[index]
        with Image.open(io.BytesIO(example.content())) as image:
            return _pixels(image, self.resolution), example.text

    def groups(self) -> list[list[int]]:
        """Indices of examples that share a `group`, in order; an example without one is a group of its own."""
        members: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            members.setdefault(example.group or f"\0{index}", []).append(index)
        return list(members.values())

    def _usable(self, example: Example, digest: hashlib._Hash) -> bool:
        if not example.text.strip():
            self.skipped.add("empty caption", example.name)
            return False
        try:
            text = example.text.encode()
        except UnicodeEncodeError:  # half a pair of surrogates, as JSON may hold
            self.skipped.add("damaged caption", example.name)
            return False
        try:
            content = example.content()
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                is_turned = turn_of(image) is not None
        except FileNotFoundError:
            self.skipped.add("missing file", example.name)
            return False
        except DAMAGE:
            self.skipped.add("damaged picture", example.name)
            return False
        digest.update(hashlib.sha256(content).digest())
        if is_turned:  # a picture as its bytes have it is another
            digest.update(b"upright")
        digest.update(text)
        return True


def _pixels(image: Image.Image, resolution: int) -> Tensor:
    image = upright(image).convert("RGB")
    if image.size != (resolution, resolution):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def find_examples(folder: Path, skipped: Skipped) -> Iterator[Example]:
    """The examples of an image folder or of shards, unread; rows without a picture are counted in `skipped`.

    Raises DataError when the folder holds neither.
    """
    if any((folder / name).is_file() for name in METADATA_NAMES):
        return read_folder(folder, skipped)
    if any(folder.glob("*.tar")):
        return read_shards(folder, skipped)
    raise DataError(f"{folder} holds no data; give an image folder with {' or '.join(METADATA_NAMES)}, or .tar shards")
