"""`unclip score`: the scores that rank pictures, of any pictures and texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gen import command
from gen.picture import read_png
from tests.typed import PROMPT, answer, refused


def test_score_is_what_ranked_the_picture(painted: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(painted.glob("0*.png"))
    printed = answer(capsys, "score", first, PROMPT, "a star", "--image", second, "--model", tiny_folder)
    assert [(Path(one["image"]), one["text"]) for one in printed["scores"]] == [
        (path, text) for path in (first, second) for text in (PROMPT, "a star")
    ]
    for path, one in ((first, printed["scores"][0]), (second, printed["scores"][2])):
        assert one["score"] == pytest.approx(read_png(path)[1]["score"], abs=1e-4)
    only_clip = answer(capsys, "score", first, PROMPT, "--model", tiny_folder / "clip")
    assert only_clip["scores"][0]["score"] == pytest.approx(printed["scores"][0]["score"], abs=1e-6)
    assert command.main(["score", str(first), PROMPT, "--model", str(tiny_folder)]) == 0
    assert PROMPT in capsys.readouterr().out


def test_all_files_that_come_first_are_pictures(
    painted: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(painted.glob("0*.png"))
    words = "a text far too long for the name of a file " * 9
    scores = answer(capsys, "score", *files, PROMPT, words, "--model", tiny_folder)["scores"]
    assert [(Path(one["image"]), one["text"]) for one in scores] == [
        (path, t) for path in files for t in (PROMPT, words)
    ]
    (alone,) = answer(capsys, "score", "-i", files[0], PROMPT, "--model", tiny_folder)["scores"]
    assert alone["score"] == pytest.approx(scores[0]["score"], abs=1e-6)
    asked = ("--model", tiny_folder)
    assert "no text is given" in refused(capsys, "score", *files, *asked)
    assert "no picture is given, for 'a star' is no file" in refused(capsys, "score", "a star", PROMPT, *asked)
    assert "stands behind a text" in refused(capsys, "score", files[0], PROMPT, files[1], *asked)
    gone = painted / "gone.png"
    assert f"'{gone}' does not exist" in refused(capsys, "score", files[0], gone, PROMPT, *asked)


def test_score_refuses_what_it_cannot_read(
    best: Path, tiny_folder: Path, own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(capsys, "score", tmp_path / "none.png", PROMPT, "--model", tiny_folder)
    (tmp_path / "cut.png").write_bytes(best.read_bytes()[:400])
    assert "cannot be read" in refused(capsys, "score", tmp_path / "cut.png", PROMPT, "--model", tiny_folder)
    assert "text is empty" in refused(capsys, "score", best, PROMPT, " ", "--model", tiny_folder)
    assert "nowhere" in refused(capsys, "score", best, PROMPT, "--model", "nowhere")
    assert "TEXT" in refused(capsys, "score", best)
    shutil.rmtree(own_folder / "clip")
    assert "no clip/" in refused(capsys, "score", best, PROMPT, "--model", own_folder)
