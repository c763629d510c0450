"""Captioned pictures on disk as an image folder: files beside a `metadata.jsonl` or `metadata.csv`.

The layout is the ecosystem's "imagefolder": each row has `file_name` and `text`; an optional `group` keeps rows that
belong together (hard negatives of one scene) in one contrastive batch.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.examples import DataError, Example, Skipped

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_PER_DIRECTORY = 10_000  # files, so that no directory grows unwieldy

Captioned = tuple[np.ndarray, str, str | None]
"""Pixels (H, W, 3) uint8, caption, group or None."""


def read_folder(folder: Path, skipped: Skipped) -> Iterator[Example]:
    """The rows of the folder's metadata file, in order; rows that name no file are counted in `skipped`.

    Raises DataError when there is no metadata file or a line of it cannot be read.
    """
    for name in METADATA_NAMES:
        if (folder / name).is_file():
            rows = _read_jsonl(folder / name) if name.endswith("jsonl") else _read_csv(folder / name)
            break
    else:
        raise DataError(f"{folder} has no {' or '.join(METADATA_NAMES)}; write one with columns file_name and text")
    for number, row in enumerate(_readable(rows, folder / name), 1):
        file_name = str(row.get("file_name") or "")
        if not file_name:
            skipped.add("row without file_name", f"row {number}")
            continue
        group = row.get("group")
        yield Example(
            folder / file_name,
            file_name,
            str(row.get("text") or ""),
            None if group in (None, "") else str(group),
        )


def write_folder(folder: str | Path, pictures: Iterable[Captioned]) -> int:
    """Write pictures as PNG files with a metadata.jsonl; return their number.

    Everything is written under a temporary name that becomes `folder` at the end, so a broken run leaves no half set.
    Raises DataError when `folder` exists.
    """
    count = 0
    with fresh_folder(Path(folder)) as partial, (partial / METADATA_NAMES[0]).open("w", encoding="utf-8") as lines:
        for pixels, text, group in pictures:
            name = f"{count // _PER_DIRECTORY:03d}/{count:06d}.png"
            (partial / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(partial / name)
            row = {"file_name": name, "text": text} | ({"group": group} if group is not None else {})
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, renamed to it when all went well and removed when not.

    Raises DataError when `folder` exists or cannot be made.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}); choose another folder") from None
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _readable(rows: Iterator[dict[str, object]], path: Path) -> Iterator[dict[str, object]]:
    try:
        yield from rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _read_jsonl(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8-sig") as lines:  # spreadsheets begin a file with a byte-order mark
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
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)
