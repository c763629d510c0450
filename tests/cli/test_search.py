"""`unclip generate --search`, `--budget`, `--diverse`: what they write, say and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gen import command
from gen.picture import read_png
from tests.typed import PROMPT, answer, refused


def searched(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *words: str) -> Any:
    """What `unclip generate` answers in eight steps."""
    return answer(capsys, "generate", PROMPT, "--model", model, "--out", out, "--steps", "8", *words)


def test_a_search_writes_what_it_kept(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = searched(capsys, tiny_folder, tmp_path / "out", "-n", "8", "--keep", "2", "--search", "draft")
    assert len(found["pictures"]) == 2 == found["shown"]
    assert len(found["candidates"]) == 3 and sum(each["kept"] for each in found["candidates"]) == 2
    assert found["account"]["decodes"] == 8 + 3
    scores = [each["score"] for each in found["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert [each["score"] for each in found["pictures"]] == scores[:2]


def test_a_copied_picture_is_reproduced(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-n", "6", "--keep", "6", "--search", "feynman_kac", "--sampler", "ddpm"]
    found = searched(capsys, tiny_folder, tmp_path / "out", *words)
    paths = [Path(each["path"]) for each in found["pictures"]]
    copied = [path for path in paths if "noise_path" in read_png(path)[1]]
    assert len(paths) == 6 and copied
    assert command.main(["reproduce", str(copied[0])]) == 0


def test_a_budget_says_how_many(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = searched(capsys, tiny_folder, tmp_path / "out", "--budget", "0.01")
    assert len(found["pictures"]) == len(found["candidates"]) == 1
    found = searched(capsys, tiny_folder, tmp_path / "more", "--budget", "60", "-n", "5", "--diverse")
    assert len(found["candidates"]) == 5 and len(found["pictures"]) == 4 == found["shown"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--search", "halfing"], "search 'halfing' is unknown; choose from: best_of, draft"),
        (["--budget", "0"], "--budget 0.0 is out of range; give a number of seconds above 0"),
        (["--search", "draft", "-n", "4"], "--keep 4 of 4 keeps them all"),
        (["--search", "draft", "--no-rerank"], "goes by CLIP's scores, but nothing is ranked"),
        (["--diverse", "-n", "2"], "--diverse chooses among candidates"),
        (["--search", "feynman_kac"], "give eta above 0, or a sampler such as ddpm"),
    ],
)
def test_mistakes_are_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    out = tmp_path / "out"
    assert line in refused(capsys, "generate", PROMPT, "--model", tiny_folder, "--out", out, *words)
    assert not out.exists()
