"""PNG records survive the file and its failures; pictures are read upright."""

import json
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from gen.picture import (
    Writer,
    largest_difference,
    read_picture,
    read_png,
    turn_of,
    upright,
    write_png,
)
from tests.pictures import noise

RECORD = {
    "prompt": "ein großer Kreis, 赤い円 🙂",
    "seed": 2**32 - 1,
    "score": 0.123456789,
    "settings": {"eta": 0.0},
}


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


def test_ctrl_c_while_the_last_are_written_waits_for_them(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(num_threads=1) as writer:
        waited, begun = writer._pool.shutdown, threading.Event()

        def interrupted() -> None:
            writer._pool.shutdown = waited  # type: ignore[method-assign]
            begun.set()
            raise KeyboardInterrupt

        writer._pool.shutdown = interrupted  # type: ignore[assignment, method-assign]
        writer._pool.submit(begun.wait)  # so that nothing is written before
        for seed in range(3):
            writer.write(noise(seed), tmp_path / f"{seed}.png", RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


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
