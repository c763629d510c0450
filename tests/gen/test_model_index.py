"""An index's entries: the class that each names, and the entry that a loaded part is written as."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_core.weights import read_json
from gen import TextToImage
from gen.model_index import INDEX, OURS, entry_of, listed, part_class


def test_a_part_is_listed_as_it_was_read(tiny: TextToImage, tiny_folder: Path) -> None:
    entries = listed(read_json(tiny_folder / INDEX))
    parts = {name: part for name, part in tiny.model.parts().items() if name in entries}
    assert {"image_normalizer", "unet", "tokenizer", "scheduler"} <= parts.keys()
    for name, part in parts.items():
        library, kind = entry_of(part)
        assert kind == entries[name][1] and part_class(library, kind, tiny_folder) is type(part)


@pytest.mark.parametrize("name", OURS)
def test_classes_that_diffusers_does_not_name_are_found(name: str) -> None:
    library, kind = OURS[name]
    assert part_class(library, name, Path()) is kind
    assert entry_of(kind.__new__(kind)) == [library, name]
