"""A few Shapes and tiny models of every part, trained two steps each through the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from gen import command
from tests.training.tiny_recipes import recipes, written
from training.data.folder import write_folder
from training.data.shapes_set import shapes

NUM_PICTURES = 40


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state a process; each test begins as a process does."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    assert write_folder(folder, shapes(NUM_PICTURES)) == NUM_PICTURES
    return folder


@pytest.fixture(scope="session")
def trained(few_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip`, `vae`, `prior`, `decoder`, each as `unclip train` leaves it, `bundled` and its `draft`."""
    out = tmp_path_factory.mktemp("trained")
    for part, recipe in recipes(few_shapes, out).items():
        assert command.main(["train", part, "--recipe", str(written(recipe, out))]) == 0
    return out
