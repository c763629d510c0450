"""Captioned pictures on disk as an image folder: files beside a `metadata.jsonl` or `metadata.csv`.

The layout is the ecosystem's "imagefolder": each row has `file_name` and `text`. An optional `group` keeps rows that
belong together (hard negatives of one scene) in one contrastive batch. Rows that cannot be used are skipped, counted
and reported once; a folder with no usable row is an error. Knows nothing of networks.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class DataError(ValueError):
    """The training data cannot be used; the message says what was found and what is needed."""


@dataclass(frozen=True)
class Example:
    """One captioned picture before it is read."""

    path: Path
    text: str
    group: str | None = None


@dataclass
class Skipped:
    """What was left out of a data set, by reason."""

    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def __str__(self) -> str:
        return "; ".join(
            f"{count} skipped: {reason} (first: {self.first[reason]})" for reason, count in self.reasons.items()
        )


class FolderDataset(Dataset[tuple[Tensor, str]]):
    """The usable rows of an image folder: item i is (pixels (3, H, W) uint8, caption).

    Every picture is opened once at the start, so a damaged file is found before training and not in the night.
    `resolution` crops to the centre square and resizes to that many pixels; None keeps sizes, which must then agree.

    Raises DataError when the folder, its metadata or every row in it is unusable.
    """

    def __init__(self, folder: str | Path, resolution: int | None = None) -> None:
        self.folder = Path(folder)
        self.resolution = resolution
        self.skipped = Skipped()
        digest = hashlib.sha256(str(resolution).encode())
        self.examples = [example for example in read_metadata(self.folder, self.skipped) if self._usable(example, digest)]
        if not self.examples:
            raise DataError(f"no usable picture in {self.folder}: {self.skipped or 'its metadata has no rows'}")
        if self.skipped.reasons:
            logger.warning("%s: %s", self.folder, self.skipped)
        self.digest = digest.hexdigest()  # of every used picture and caption, in order

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        example = self.examples[index]
        with Image.open(example.path) as image:
            return _pixels(image, self.resolution), example.text

    def groups(self) -> list[list[int]]:
        """Indices of rows that share a `group`, in order; a row without one is a group of its own."""
        members: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            members.setdefault(example.group or f"\0{index}", []).append(index)
        return list(members.values())

    def _usable(self, example: Example, digest: hashlib._Hash) -> bool:
        name = example.path.name
        if not example.text.strip():
            self.skipped.add("empty caption", name)
            return False
        try:
            content = example.path.read_bytes()
            with Image.open(example.path) as image:
                image.load()
        except FileNotFoundError:
            self.skipped.add("missing file", name)
            return False
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # what Pillow raises on damaged files
            self.skipped.add("damaged picture", name)
            return False
        digest.update(hashlib.sha256(content).digest())
        digest.update(example.text.encode())
        return True


def read_metadata(folder: Path, skipped: Skipped) -> Iterator[Example]:
    """The rows of the folder's metadata file, in order; rows that name no file are counted in `skipped`."""
    for name in METADATA_NAMES:
        if (folder / name).is_file():
            rows = _read_jsonl(folder / name) if name.endswith("jsonl") else _read_csv(folder / name)
            break
    else:
        raise DataError(f"{folder} has no {' or '.join(METADATA_NAMES)}; write one with columns file_name and text")
    for number, row in enumerate(rows, 1):
        file_name = row.get("file_name")
        if not file_name:
            skipped.add("row without file_name", f"row {number}")
            continue
        group = row.get("group")
        yield Example(folder / str(file_name), str(row.get("text") or ""), None if group in (None, "") else str(group))


def write_folder(
    folder: str | Path, pictures: Iterable[tuple[np.ndarray, str, str | None]], *, per_directory: int = 10_000
) -> int:
    """Write (pixels (H, W, 3) uint8, caption, group or None) as PNG files with a metadata.jsonl; return their number.

    Everything is written under a temporary name that becomes `folder` at the end, so a broken run leaves no half set.
    Raises DataError when `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = 0
    with (partial / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for pixels, text, group in pictures:
            name = f"{count // per_directory:03d}/{count:06d}.png"
            (partial / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(partial / name)
            row = {"file_name": name, "text": text} | ({"group": group} if group is not None else {})
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    partial.rename(folder)
    return count


def _pixels(image: Image.Image, resolution: int | None) -> Tensor:
    image = image.convert("RGB")
    if resolution is not None and image.size != (resolution, resolution):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _read_jsonl(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is not a JSON object; write file_name and text")
            yield row


def _read_csv(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)
