"""The README tells the truth: its commands run as typed, in order, and its Python does what it says."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading: str, language: str = "") -> list[str]:
    """The fenced blocks of a section, in order."""
    section = re.split(r"^## ", README, flags=re.MULTILINE)
    body = next(part for part in section if part.startswith(heading))
    return re.findall(rf"^```{language}\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)


def test_the_command_line_section_runs_as_typed(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = blocks("On the command line")[0].splitlines()
    assert len(commands) >= 4
    for command in commands:
        ran = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
    assert len(list((tmp_path / "stars").glob("0*.png"))) == 4
    assert len(list((tmp_path / "batch").rglob("*.png"))) == 2


def test_the_python_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".* is ignored: ")  # no example gives what counts for nothing
        for block in blocks("From Python", "python"):
            exec(block, names)
    result = names["result"]
    assert len(result.images) == len(result.scores) == len(result.seeds) == 4  # type: ignore[attr-defined]
    assert result.scores == sorted(result.scores, reverse=True)  # type: ignore[attr-defined]
    assert len(list((tmp_path / "batch").rglob("*.png"))) == 2
    assert names["red"].done() and names["blue"].done()  # type: ignore[attr-defined]


def test_the_training_commands_name_recipes_that_are_there() -> None:
    commands = [line for block in blocks("Training") for line in block.splitlines() if line.startswith("unclip train")]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        assert (ROOT / words[words.index("--recipe") + 1]).is_file(), command


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
