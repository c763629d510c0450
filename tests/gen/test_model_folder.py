"""Where a model's folder is, and what is said of a name that has none."""

from __future__ import annotations

import pytest

from gen import TextToImage
from gen.model_folder import bundled, find
from gen.model_index import INDEX


def test_bundled_models_are_found_by_name() -> None:
    assert "shapes64" in bundled()
    for name in bundled():
        assert (find(name) / INDEX).is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes65", "model 'shapes65' is unknown; give a bundled name"),
        ("./nowhere/at_all", "is unknown"),
        ("nobody/nothing-at-all", "cannot be fetched from the hub"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(name, device="cpu")
    assert "\n" not in str(caught.value)
