"""The contact sheet shows every picture as painted, and its title in whatever script."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from gen.sheet import GAP, LINE, TILE, _fit, _font_for, _lines, _num_lacking, contact_sheet
from tests.pictures import noise


def test_sheet_shows_every_pixel_as_painted() -> None:
    pictures = [noise(seed) for seed in range(16)]
    sheet = np.asarray(contact_sheet(pictures, [f"seed {s}" for s in range(16)], num_kept=4, title="a prompt"))
    scale = round(TILE / 64)
    for picture in pictures:
        large = np.asarray(picture).repeat(scale, axis=0).repeat(scale, axis=1)
        corner = large[0, : 4 * scale]
        rows, columns = np.nonzero((sheet[:, :, :] == corner[0]).all(axis=2))
        assert any(
            np.array_equal(sheet[y : y + len(large), x : x + len(large)], large)
            for y, x in zip(rows, columns, strict=True)
        )


def test_sheet_takes_any_size_and_long_captions() -> None:
    for size in ((1, 1), (64, 40), (40, 1000), (64, 190), (700, 300), (2000, 2000)):
        sheet = contact_sheet([noise(0, size)] * 3, ["a caption far too long for its tile " * 5] * 3, title="w " * 500)
        assert sheet.width < 1500 and sheet.height < 800
    with pytest.raises(ValueError, match="one caption per picture"):
        contact_sheet([noise(0)], [])


def test_a_title_in_another_script_is_drawn_where_a_font_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ImageFont.load_default(size=12).getname()
    assert _font_for("a red star, 3 of 4 (50 %)").getname() == own  # type: ignore[union-attr]
    monkeypatch.setattr("gen.sheet.FONTS", ("no font.ttf",))
    assert _font_for("красная звезда").getname() == own  # type: ignore[union-attr]
    contact_sheet([noise(0)], ["a caption"], title="красная звезда\u0301 \ud800 🙂\n")
    monkeypatch.undo()
    try:
        ImageFont.truetype("DejaVuSans.ttf", 12)
    except OSError:
        pytest.skip("needs DejaVu Sans")
    found = _font_for("grüne, красная звезда")
    assert _num_lacking(found, "grüne, красная звезда") == 0
    boxes, letters = (np.asarray(contact_sheet([noise(0)], ["c"], title=each)) for each in ("\uffff" * 7, "красная"))
    assert not np.array_equal(boxes, letters)


def test_a_caption_may_have_several_lines_or_none() -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(size=12)
    text = "a large purple triangle on the right of a star"
    first, second = _lines(draw, text, font, 100, 2)
    assert text.startswith(first) and second.endswith("…") and text.startswith(f"{first} {second[:-1]}")
    assert " ".join(_lines(draw, text, font, 100, 9)) == text
    assert all(draw.textlength(line, font) <= 100 for line in _lines(draw, text, font, 100, 9))
    assert _lines(draw, text, font, 100, 1) == [_fit(draw, text, font, 100)]
    assert _lines(draw, " ", font, 100, 2) == []
    assert "".join(_lines(draw, "w" * 99, font, 100, 3)) == _fit(draw, "w" * 99, font, 100)
    heights = [contact_sheet([noise(0)], captions, num_lines=3).height for captions in (None, ["a star"])]
    assert heights == [2 * GAP + TILE, 2 * GAP + TILE + 3 * LINE]


def test_a_line_is_cut_where_it_would_be_too_wide_and_in_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(size=12)
    for text, width in (("a red star above a blue circle", 90), ("a star", 90), ("", 90), ("wide", 3), ("i" * 99, 400)):
        cut = _fit(draw, text, font, width)
        fitting = [k for k in range(len(text) + 1) if draw.textlength(text[:k] + "…", font) <= width]
        assert cut == (text if draw.textlength(text, font) <= width else text[: max(fitting, default=0)] + "…")
    measured = []
    length = draw.textlength
    monkeypatch.setattr(draw, "textlength", lambda text, font: measured.append(len(text)) or length(text, font))
    assert _fit(draw, "w " * 100_000, font, 500).endswith("…")
    assert len(measured) < 20 and max(measured) <= 501
