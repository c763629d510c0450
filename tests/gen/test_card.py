"""What a model says of itself: read as it was written, and which words it does not know."""

from __future__ import annotations

import json
from pathlib import Path

from gen.card import Card, words_of


def test_the_card(tmp_path: Path) -> None:
    card = Card(knows="shapes", words=("a", "red", "star"), defaults={"eta": 0.5}, more={"hours": 2})
    (tmp_path / "unclip.json").write_text(json.dumps(card.to_json()))
    assert Card.read(tmp_path) == card
    assert card.unknown_words("A photo of a red-ish star!") == ["photo", "of", "ish"]
    assert Card().unknown_words("anything") == []
    assert Card.read(tmp_path / "nowhere") == Card()


def test_words_are_parted_by_what_is_neither_letter_nor_digit() -> None:
    assert words_of("A  photo, of\na red-ish STAR no.5 über Straße") == (
        ["a", "photo", "of", "a", "red", "ish", "star", "no", "5", "über", "straße"]
    )
    assert words_of("...") == []
