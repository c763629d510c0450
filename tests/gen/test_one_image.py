"""The example that a newcomer reads first: short, and it runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_image.py"


def test_one_image(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tiny_folder), str(tmp_path / "one.png")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert Image.open(tmp_path / "one.png").size == (64, 64)
