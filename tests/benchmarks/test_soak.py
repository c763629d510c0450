"""benchmarks/soak.py: every request ends, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import soak


def test_the_soak_leaves_nothing(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak.main(str(tiny_folder), 40, 4, "cpu", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["ends"].values()) == 40 and set(found["ends"]) == {"painted", "cancelled", "failed"}
    assert len(found["rounds"]) == 10 and "left behind" not in capsys.readouterr().out
