"""PNG records survive the file and its failures; the sheet shows every picture as painted."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

from gen.picture import (
    TILE,
    Writer,
    _fit,
    _font_for,
    _num_lacking,
    contact_sheet,
    largest_difference,
    read_picture,
    read_png,
    turn_of,
    upright,
    write_png,
)

RECORD = {
    "prompt": "ein großer Kreis, 赤い円 🙂",
    "seed": 2**32 - 1,
    "score": 0.123456789,
    "settings": {"eta": 0.0},
}


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_picture_and_record_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "0001.png"
    write_png(noise(0), path, RECORD)
    picture, record = read_png(path)
    assert record == RECORD
    assert largest_difference(picture, noise(0)) == 0


def test_other_programs_find_prompt_and_record_by_name(tmp_path: Path) -> None:
    path = tmp_path / "0001.png"
    write_png(noise(0), path, RECORD)
    with Image.open(path) as opened:
        assert opened.text["Software"] == "unclip"
        assert opened.text["Description"] == RECORD["prompt"]
        assert json.loads(opened.text["unclip"]) == RECORD


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_png(noise(0), tmp_path / "a.png", {"score": float("nan")})  # not JSON
    with pytest.raises(TypeError):
        write_png(noise(0), tmp_path / "a.png", {"score": object()})
    hsv = Image.new("HSV", (8, 8))  # a mode PNG does not know: fails while the file is open
    with pytest.raises(OSError):
        write_png(hsv, tmp_path / "a.png", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_all_that_was_handed_over_is_written_however_the_block_ends(tmp_path: Path) -> None:
    for name, error in {"end": None, "error": RuntimeError("enough"), "ctrl-c": KeyboardInterrupt()}.items():
        folder = tmp_path / name
        folder.mkdir()
        with suppress(RuntimeError, KeyboardInterrupt), Writer(num_threads=2) as writer:
            for seed in range(9):
                writer.write(noise(seed, (300, 300)), folder / f"{seed}.png", RECORD)
            if error is not None:
                raise error
        assert sorted(path.name for path in folder.iterdir()) == [f"{seed}.png" for seed in range(9)]
        for seed in range(9):
            picture, record = read_png(folder / f"{seed}.png")
            assert record == RECORD and largest_difference(picture, noise(seed, (300, 300))) == 0


def test_a_file_that_fails_is_told_of_and_the_others_are_written(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"), Writer() as writer:
        for seed in range(3):
            writer.write(noise(seed), tmp_path / f"{seed}.png", RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]
    assert (tmp_path / "1.png").read_bytes() == b"mine" and read_png(tmp_path / "2.png")[1] == RECORD


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_png(noise(0), path, RECORD)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_without_our_record_is_told(tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    noise(0).save(path)
    with pytest.raises(ValueError, match=r"plain\.png holds no unclip record"):
        read_png(path)
    noise(0).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="holds no unclip record"):
        read_png(tmp_path / "photo.jpg")


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    for text in ("{", "[1]"):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("unclip", text)
        noise(0).save(tmp_path / "bad.png", pnginfo=chunks)
        with pytest.raises(ValueError, match="damaged unclip record"):
            read_png(tmp_path / "bad.png")


def test_a_missing_or_cut_picture_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_picture(tmp_path / "none.png")
    whole = tmp_path / "whole.png"
    write_png(noise(0), whole, RECORD)
    cut = tmp_path / "cut.png"
    for length in (0, 10, len(whole.read_bytes()) // 2):
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            read_picture(cut)
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(tmp_path)  # a folder


def test_largest_difference_is_in_levels_of_one_channel() -> None:
    pixels = np.asarray(noise(0)).copy()
    pixels[5, 7, 2] = 200
    one = Image.fromarray(pixels)
    pixels[5, 7, 2] = 197
    assert largest_difference(one, Image.fromarray(pixels)) == 3
    assert largest_difference(one, one) == 0
    assert largest_difference(one, noise(0, (32, 64))) == 255
    black, white = Image.new("RGB", (4, 4), (0, 0, 0)), Image.new("RGB", (4, 4), (255, 255, 255))
    assert largest_difference(black, white) == 255  # no unsigned wrap-around


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
    monkeypatch.setattr("gen.picture.FONTS", ("no font.ttf",))
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


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_upright_as_pillow_turns_it(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    noise(0, (20, 12)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        expected = ImageOps.exif_transpose(picture)
        assert upright(picture).tobytes() == expected.tobytes() and upright(picture).size == expected.size
        assert (turn_of(picture) is None) == (orientation not in range(2, 9))


def test_damaged_exif_leaves_a_picture_as_it_lies(tmp_path: Path) -> None:
    """Whatever byte of it is another."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.0
    noise(0, (20, 12)).save(tmp_path / "a.jpg", exif=exif)
    whole = (tmp_path / "a.jpg").read_bytes()
    start = whole.index(b"Exif")
    for place in range(start + 6, start + len(exif.tobytes())):
        for value in (0, 255):
            (tmp_path / "b.jpg").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            assert read_picture(tmp_path / "b.jpg").size in ((20, 12), (12, 20))
