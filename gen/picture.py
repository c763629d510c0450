"""Pictures as files: PNG with their own record inside, and the contact sheet that shows many at a glance.

Owns: the text chunks, writing whole files or none, the sheet's layout, comparing two pictures. It knows
Pillow and JSON alone; what a record says is the pipeline's, and this module must not import torch.
"""

import json
import os
import struct
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

CHUNK = "unclip"  # the text chunk that holds the record as JSON
SOFTWARE = "unclip"  # PNG's standard keyword `Software`; `Description` holds the prompt for other programs

TILE = 192  # px; small pictures are brought near this width: room for a score and the longest seed
GAP, LINE = 8, 18  # px; between tiles, and one line of caption
INK, PAPER, FRAME = (30, 30, 30), (255, 255, 255), (40, 140, 80)

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

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
LETTERS = 12  # px; their height
# Fonts of many scripts that Linux, macOS and Windows have, by the names of their files; Pillow's own is of English.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("arial.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf"),
)


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

    However the block ends, by an error or Ctrl-C too, all that was handed over by then is written before it is left. An
    error of a file is raised there, the first one's, where the block itself raised none.
    """

    def __init__(self, num_threads: int = 4) -> None:  # zlib takes most of the time, and lets other threads run
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="unclip-png")
        self._files: list[Future[None]] = []

    def write(self, picture: Image.Image, path: Path, record: dict[str, Any] | None = None) -> None:
        """Have `write_png` called; the picture must not be changed any more."""
        self._files.append(self._pool.submit(write_png, picture, path, record))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for file in self._files:
                file.result()


def read_png(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """A picture and its record; ValueError when the file is no picture or holds no record of ours."""
    picture = read_picture(path)
    told = "paint one with `unclip generate`, and keep the PNG as written: editors drop its text chunks"
    text = getattr(picture, "text", {}).get(CHUNK)
    if text is None:
        raise ValueError(f"{path} holds no unclip record; {told}")
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a damaged unclip record; {told}")
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


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    num_kept: int = 0,  # the first so many are framed
    title: str = "",
    columns: int | None = None,  # None: about as wide as high, at least 4
) -> Image.Image:
    """All pictures in rows, each with its caption below, the kept ones framed and first.

    Small pictures are enlarged by a whole factor without smoothing, so the sheet shows what was painted.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures with {len(captions)} captions; give one caption per picture")
    columns = columns or max(4, round(len(pictures) ** 0.5))
    columns = min(columns, len(pictures))
    width, height = _tile_size(pictures[0].size)
    font = ImageFont.load_default(size=LETTERS)
    top = GAP + (LINE + GAP if title else 0)
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB",
        (GAP + columns * (width + GAP), top + rows * (height + LINE + GAP)),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        heading = _font_for(title[: sheet.width])  # more do not fit
        draw.text((GAP, GAP), _fit(draw, title, heading, sheet.width - 2 * GAP), INK, heading)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GAP + index % columns * (width + GAP), top + index // columns * (height + LINE + GAP)
        larger = width >= picture.width
        tile = picture.resize((width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
        sheet.paste(tile, (x, y))
        # Every tile has a thin outline, or a white picture would have no edge on the white sheet.
        kept = index < num_kept
        outline = (x - 3, y - 3, x + width + 2, y + height + 2) if kept else (x - 1, y - 1, x + width, y + height)
        draw.rectangle(outline, outline=FRAME if kept else (200, 200, 200), width=3 if kept else 1)
        draw.text((x, y + height + 3), _fit(draw, caption, font, width), INK, font)
    return sheet


def _tile_size(size: tuple[int, int]) -> tuple[int, int]:
    """A picture's size on the sheet: enlarged by a whole factor, or made smaller to fit."""
    width, height = size
    if max(width, height) < TILE:
        factor = round(TILE / max(width, height))
        return width * factor, height * factor
    scale = min(1.0, 2 * TILE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _font_for(text: str) -> Font:
    """Pillow's own font where it has every letter of a text, else the font of this machine that lacks the fewest."""
    best: Font = ImageFont.load_default(size=LETTERS)
    fewest = _num_lacking(best, text)
    for name in FONTS:
        if not fewest:
            break
        with suppress(OSError):  # it is not here
            font = ImageFont.truetype(name, LETTERS)
            if (lacking := _num_lacking(font, text)) < fewest:
                best, fewest = font, lacking
    return best


def _num_lacking(font: Font, text: str) -> int:
    """How many letters of a text a font has no picture of, so that it draws the box that stands for any such."""
    box = _drawn(font, "\uffff")  # which is no letter and never will be
    return sum(_drawn(font, letter) == box for letter in set(text) if letter.isprintable() and not letter.isspace())


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """Text in one line, cut with an ellipsis where it is wider than the room it has."""
    line = " ".join(text.split())
    most = min(len(line), width)  # letters, which are a pixel wide at least
    if len(line) == most and draw.textlength(line, font) <= width:
        return line
    too_wide = range(1, most + 1)  # by how many letters
    fitting = bisect_left(too_wide, True, key=lambda number: draw.textlength(line[:number] + "…", font) > width)
    return line[:fitting] + "…"
