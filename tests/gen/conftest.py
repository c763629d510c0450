from __future__ import annotations

from pathlib import Path

import pytest

from gen import TextToImage
from tests.tiny import make_tiny_stable_unclip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_unclip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_folder, device="cpu")
