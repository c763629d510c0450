"""Where `unclip generate` writes: never over what is there; what cannot be written is told before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gen.output_folder import output_folder
from tests.typed import PROMPT, answer, refused


def test_a_filled_folder_is_left_alone(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    common = ["generate", PROMPT, "-n", 1, "--steps", 1, "--seed", 0, "--model", tiny_folder, "--out", out]
    assert answer(capsys, *common)["out"] == str(out), "an empty folder is used as it is"
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert answer(capsys, *common)["out"] == str(out / "002")
    assert answer(capsys, *common)["out"] == str(out / "003")
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_two_runs_at_once_take_two_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as first, output_folder(out) as second, output_folder(out) as third:
        assert (first, second, third) == (out, out / "002", out / "003")
        for folder in (first, second):
            (folder / "0001.png").write_bytes(b"")
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert left == ["0001.png", "002", "002/0001.png", "003"], "nothing hidden stays"


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/unclip")):
        message = refused(capsys, "generate", PROMPT, "--model", "nowhere", "--out", out)
        assert f"out folder '{out}' cannot be written" in message and "--out" in message, "found before the model was"
    assert file.read_text() == "mine"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if not os.access(closed, os.W_OK):  # root may write anywhere
        message = refused(capsys, "generate", PROMPT, "--model", tiny_folder, "--out", closed / "out")
        assert "cannot be written" in message
