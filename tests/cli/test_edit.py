"""Pictures, masks and edits that `unclip generate` and `reproduce` are given: what they write, say and refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen import command
from gen.picture import read_png
from tests.pictures import noise
from tests.typed import PROMPT, answer, refused


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    white = np.zeros((64, 64), dtype=np.uint8)
    white[:32] = 255
    noise(0).save(tmp_path / "in.png")
    Image.fromarray(white).save(tmp_path / "mask.png")
    Image.fromarray(white[:, :32]).save(tmp_path / "narrow.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("in", "mask", "narrow")}


def test_a_picture_is_painted_from_one_and_repeated(
    tiny_folder: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", PROMPT, "--model", tiny_folder, "-n", "3", "--keep", "1", "--steps", "5"]
    asked += ["--out", tmp_path / "out", "--image", files["in"], "--mask", files["mask"], "--strength", "0.6"]
    found = answer(capsys, *asked)
    assert found["settings"]["strength"] == 0.6 and found["account"]["evaluations"]["decoder"] == 3 * 3 * 2
    path = found["pictures"][0]["path"]
    record = read_png(Path(path))[1]
    assert record["image"]["path"] == files["in"] and record["mask_image"]["path"] == files["mask"]
    assert command.main(["reproduce", path]) == 0
    moved = Path(files["mask"]).rename(tmp_path / "moved.png")
    assert "mask.png does not exist" in refused(capsys, "reproduce", path)
    assert command.main(["reproduce", path, "--image", str(moved)]) == 0
    Image.open(files["narrow"]).save(files["mask"])
    message = refused(capsys, "reproduce", path)
    assert "has changed since" in message and "give it as it was with --image" in message


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--mask", "mask"], "--mask was given without --image"),
        (["--strength", "0.5"], "--strength was given without --image"),
        (["--image", "in", "--strength", "0"], "--strength 0.0 leaves none of"),
        (["--image", "in", "--strength", "2"], "--strength 2.0 is out of range; give a number from 0 to 1"),
        (["--image", "in", "--mask", "narrow"], "--mask is 32 x 64 pixels, and image 64 x 64"),
        (["--image", "nowhere.png"], "picture nowhere.png does not exist"),
        (["--image", "in", "--width", "32"], "only one of --height and --width was given"),
        (["--edit-from", "a star"], "--edit-from was given without --variation-of"),
        (["--prompt-weights", "--negative", "a (star"], "that is not closed; write \\( for itself"),
    ],
)
def test_mistakes_are_one_line(
    tiny_folder: Path,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
) -> None:
    out = tmp_path / "out"
    typed = [files.get(word, word) for word in words]
    assert line in refused(capsys, "generate", PROMPT, "--model", tiny_folder, "--out", out, *typed)
    assert not out.exists()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (red:1.3) star", ["--prompt-weights", "--long-prompts", "--prior-best-of", "2"]),
        (PROMPT, ["--variation-of", "in", "--edit-from", "a star", "--edit-amount", "0.4"]),
        (PROMPT, ["--interpolate-prompt", "a star", "--interpolation", "0.3"]),
    ],
    ids=["weights", "variation", "prompts"],
)
def test_other_edits_are_painted_and_repeated(
    tiny_folder: Path,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    words: list[str],
) -> None:
    typed = [files.get(word, word) for word in words]
    asked = ["generate", prompt, "--model", tiny_folder, "-n", "1", "--out", tmp_path / "out"]
    found = answer(capsys, *asked, *typed)
    assert command.main(["reproduce", found["pictures"][0]["path"]]) == 0
