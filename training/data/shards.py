"""Captioned pictures in webdataset tar shards, as img2dataset writes them.

A sample is the files of one key: a picture (`.png`, `.jpg`, `.webp`), its caption (`.txt`), and optionally a `.json`
with `group` (and `caption`, where there is no `.txt`). Shards are indexed once, so examples are read in any order.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image

from training.data.examples import DataError, Example, Skipped
from training.data.folder import Captioned, fresh_folder

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PER_SHARD = 10_000  # samples


def read_shards(folder: Path, skipped: Skipped) -> Iterator[Example]:
    """The samples of every shard in the folder, in order; a key without a picture is counted in `skipped`.

    Raises DataError when a shard is not a tar file.
    """
    for path in sorted(folder.glob("*.tar")):
        try:
            with tarfile.open(path, "r:") as shard:
                members = [member for member in shard if member.isfile()]
                for key, files in groupby(members, key=_key):
                    try:
                        example = _example(path, shard, key, {_suffix(member): member for member in files})
                    except ValueError:  # JSON or UTF-8
                        skipped.add("damaged caption", f"{path.name}:{key}")
                        continue
                    if example is None:
                        skipped.add("sample without a picture", f"{path.name}:{key}")
                    else:
                        yield example
        except tarfile.TarError as error:
            raise DataError(f"{path} is not a whole tar file ({error}); fetch or write it again") from None


def write_shards(folder: str | Path, pictures: Iterable[Captioned], *, per_shard: int = PER_SHARD) -> int:
    """Write pictures as PNG in tar shards `00000.tar`, `00001.tar`, ...; return their number.

    Everything is written under a temporary name that becomes `folder` at the end. Raises DataError when it exists.
    """
    count = 0
    remaining = iter(pictures)
    with fresh_folder(Path(folder)) as partial:
        while portion := list(islice(remaining, 1)):
            number = count // per_shard
            with tarfile.open(partial / f"{number:05d}.tar", "w") as shard:
                for place, (pixels, text, group) in enumerate(chain(portion, islice(remaining, per_shard - 1))):
                    key = f"{number:05d}{place:04d}"
                    encoded = io.BytesIO()
                    Image.fromarray(pixels).save(encoded, "PNG")
                    _add(shard, f"{key}.png", encoded.getvalue())
                    _add(shard, f"{key}.txt", text.encode())
                    _add(shard, f"{key}.json", json.dumps({"key": key, "caption": text, "group": group}).encode())
                    count += 1
    return count


def _suffix(member: tarfile.TarInfo) -> str:
    return Path(member.name).suffix.lower()


def _key(member: tarfile.TarInfo) -> str:
    return str(Path(member.name).with_suffix(""))


def _example(path: Path, shard: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo]) -> Example | None:
    picture = next((files[suffix] for suffix in PICTURES if suffix in files), None)
    if picture is None:
        return None
    record: Any = json.loads(_read(shard, files[".json"])) if ".json" in files else {}
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    text = _read(shard, files[".txt"]).decode() if ".txt" in files else str(record.get("caption") or "")
    group = record.get("group")
    return Example(
        path,
        f"{path.name}:{key}",
        text,
        None if group is None else str(group),
        offset=picture.offset_data,
        size=picture.size,
    )


def _read(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None, "only regular files are asked for"
    return file.read()


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
