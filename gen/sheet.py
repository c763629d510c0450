"""The contact sheet, which shows many pictures at a glance. It knows Pillow alone, and must not import torch."""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont

TILE = 192  # px; small pictures are brought near this width: room for a score and the longest seed
GAP, LINE = 8, 18  # px; between tiles, and one line of caption
INK, PAPER, FRAME = (30, 30, 30), (255, 255, 255), (40, 140, 80)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
LETTERS = 12  # px; their height
# Fonts of many scripts that Linux, macOS and Windows have, by the names of their files; Pillow's own is of English.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("arial.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf"),
)


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,  # None: pictures alone
    *,
    num_kept: int = 0,  # the first so many are framed
    title: str = "",
    columns: int | None = None,  # None: about as wide as high, at least 4
    num_lines: int = 1,  # of a caption, at most
) -> Image.Image:
    """All pictures in rows, each with its caption below, the kept ones framed and first.

    Small pictures are enlarged by a whole factor without smoothing, so the sheet shows what was painted.
    """
    if captions is None:
        captions, num_lines = [""] * len(pictures), 0
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures with {len(captions)} captions; give one caption per picture")
    columns = columns or max(4, round(len(pictures) ** 0.5))
    columns = min(columns, len(pictures))
    width, height = _tile_size(pictures[0].size)
    font = ImageFont.load_default(size=LETTERS)
    top = GAP + (LINE + GAP if title else 0)
    below = height + num_lines * LINE + GAP  # from one row to the next
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), top + rows * below), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        heading = _font_for(title[: sheet.width])  # more do not fit
        draw.text((GAP, GAP), _fit(draw, title, heading, sheet.width - 2 * GAP), INK, heading)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GAP + index % columns * (width + GAP), top + index // columns * below
        larger = width >= picture.width
        tile = picture.resize((width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
        sheet.paste(tile, (x, y))
        # Every tile has a thin outline, or a white picture would have no edge on the white sheet.
        kept = index < num_kept
        outline = (x - 3, y - 3, x + width + 2, y + height + 2) if kept else (x - 1, y - 1, x + width, y + height)
        draw.rectangle(outline, outline=FRAME if kept else (200, 200, 200), width=3 if kept else 1)
        for number, line in enumerate(_lines(draw, caption, font, width, num_lines)):
            draw.text((x, y + height + 3 + number * LINE), line, INK, font)
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


def _lines(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int, most: int) -> list[str]:
    """Text in at most so many lines, broken between words; the last is cut where more is left."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most:
        taken = len(words) if len(lines) == most - 1 else 1  # the last line is given all that is left
        while taken < len(words) and draw.textlength(" ".join(words[: taken + 1]), font) <= width:
            taken += 1
        lines.append(_fit(draw, " ".join(words[:taken]), font, width))
        words = words[taken:]
    return lines


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """Text in one line, cut with an ellipsis where it is wider than the room it has."""
    line = " ".join(text.split())
    most = min(len(line), width)  # letters, which are a pixel wide at least
    if len(line) == most and draw.textlength(line, font) <= width:
        return line
    too_wide = range(1, most + 1)  # by how many letters
    fitting = bisect_left(too_wide, True, key=lambda number: draw.textlength(line[:number] + "…", font) > width)
    return line[:fitting] + "…"
