"""What commands are given: pictures as `unclip generate` leaves them, and a model to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gen import command
from tests.typed import PROMPT


@pytest.fixture(scope="session")
def painted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `unclip generate` leaves it: six candidates, the best two kept."""
    out = tmp_path_factory.mktemp("painted") / "out"
    arguments = ["generate", PROMPT, "-n", "6", "--keep", "2", "--seed", "10", "--model", str(tiny_folder)]
    assert command.main([*arguments, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def best(painted: Path) -> Path:
    """The better of the two pictures."""
    return min(painted.glob("0001-*.png"))


@pytest.fixture
def own_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of the test's own, to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))
