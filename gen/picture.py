"""Pictures as files: PNG with their own record inside, read upright, written whole or not at all.

Owns: the text chunks, writing, reading, comparing two pictures. It knows Pillow and JSON alone; what a record says is
the pipeline's, and this module must not import torch.
"""

import json
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

CHUNK = "unclip"  # the text chunk that holds the record as JSON
SOFTWARE = "unclip"  # PNG's standard keyword `Software`; `Description` holds the prompt for other programs

# By EXIF's Orientation. Pillow's exif_transpose writes the rest of EXIF anew, and fails where some of it is damaged.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def write_png(picture: Image.Image, path: Path, record: dict[str, Any] | None = None) -> None:
    """Write a PNG with its record in text chunks; the name appears only when the whole file stands.

    A record is a JSON dict; its `prompt` is written once more as the standard `Description`. Raises
    FileExistsError rather than replacing a file.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", SOFTWARE)
    if record is not None:
        if "prompt" in record:
            chunks.add_itxt("Description", str(record["prompt"]))  # iTXt: the prompt may be in any script
        chunks.add_itxt(CHUNK, json.dumps(record, ensure_ascii=False, allow_nan=False))
    if path.exists():
        raise FileExistsError(f"{path} exists already and is not replaced")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(part, format="PNG", pnginfo=chunks)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Writer:
    """Writes PNG files in threads, while what comes next is painted or laid out: `with Writer() as writer`.

    However the block ends, by an error or Ctrl-C too, all that was handed over by then is written before it is left.
    Ctrl-C meanwhile waits too, and one more does not. An error of a file is raised there, the first one's, where the
    block itself raised none; or by the file's future.
    """

    def __init__(self, num_threads: int = 4) -> None:  # zlib takes most of the time, and lets other threads run
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="unclip-png")
        self._failed: list[Future[None]] = []

    def write(self, picture: Image.Image, path: Path, record: dict[str, Any] | None = None) -> Future[None]:
        """Have `write_png` called; the picture must not be changed any more."""
        file = self._pool.submit(write_png, picture, path, record)
        file.add_done_callback(self._note)
        return file

    def _note(self, file: Future[None]) -> None:
        if file.exception() is not None:
            self._failed.append(file)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._pool.shutdown()
        except KeyboardInterrupt:
            self._pool.shutdown()
            raise
        if error is None:
            for file in self._failed:
                file.result()


def read_png(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """A picture and its record; ValueError when the file is no picture or holds no record of ours."""
    picture = read_picture(path)
    advice = "paint one with `unclip generate`, and keep the PNG as written: editors drop its text chunks"
    text = getattr(picture, "text", {}).get(CHUNK)
    if text is None:
        raise ValueError(f"{path} holds no unclip record; {advice}")
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a damaged unclip record; {advice}")
    return picture, record


def read_picture(path: Path) -> Image.Image:
    """Any picture Pillow reads, as RGB, its text chunks kept; ValueError when it is missing or damaged."""
    try:
        with Image.open(path) as opened:
            opened.load()
            chunks = dict(getattr(opened, "text", {}))
            picture = upright(opened).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"picture {path} does not exist; give the path of an image file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {path} cannot be read ({error}); give a whole image file") from None
    picture.text = chunks  # type: ignore[attr-defined]  # where Pillow itself keeps a PNG's
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """A picture as the camera held it."""
    turn = turn_of(picture)
    return picture if turn is None else picture.transpose(turn)


def turn_of(picture: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright, as its EXIF says; None: nothing, or EXIF that nobody can read."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except (OSError, SyntaxError, TypeError, ValueError, struct.error):
        return None


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of any channel of any pixel, in 8-bit levels; 255 when the sizes differ."""
    if one.size != other.size:
        return 255
    a, b = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (one, other))
    return int(np.abs(a - b).max())
