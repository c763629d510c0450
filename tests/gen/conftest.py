from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gen import TextToImage
from gen.attention.network import restore_attention
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl
from tests.tiny_kandinsky import VERSIONS, make_tiny_kandinsky


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_folder, device="cpu")


@pytest.fixture
def own(tiny_folder: Path) -> TextToImage:
    """A model of the test's own, to change."""
    return TextToImage.from_pretrained(tiny_folder, device="cpu")


@pytest.fixture
def stock_tiny(tiny_folder: Path) -> TextToImage:
    """Such a model with diffusers' own attention processors."""
    model = TextToImage.from_pretrained(tiny_folder, device="cpu")
    restore_attention(model.model.unet)
    return model


@pytest.fixture(scope="module")
def models(folders: dict[Any, Path]) -> dict[Any, TextToImage]:
    """Of a test file's own `folders`."""
    return {name: TextToImage.from_pretrained(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture(scope="session")
def stable_diffusion_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of 1 and XL: "1" and "xl"."""
    root = tmp_path_factory.mktemp("stable_diffusion")
    return {"1": make_tiny_stable_diffusion(root / "1"), "xl": make_tiny_stable_diffusion_xl(root / "xl")}


@pytest.fixture(scope="session")
def kandinsky_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Of 2.2 and 2.1: "decoder", "prior" and "combined"."""
    root = tmp_path_factory.mktemp("kandinsky")
    return {version: make_tiny_kandinsky(root / version, version) for version in VERSIONS}


@pytest.fixture(scope="session")
def kandinskys(kandinsky_folders: dict[str, dict[str, Path]]) -> dict[str, TextToImage]:
    return {name: TextToImage.from_pretrained(of["combined"], device="cpu") for name, of in kandinsky_folders.items()}
