"""What a model says of itself, in a file beside it: words it knows, default settings, measured scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_core.weights import read_json
from gen.settings import JSON

CARD = "unclip.json"


@dataclass(frozen=True)
class Card:
    """What a model says of itself (`unclip.json`); a folder without one knows nothing of us."""

    knows: str = ""  # one line for people: what it can be asked for
    words: tuple[str, ...] = ()  # every word it was trained on; empty: any
    defaults: dict[str, Any] = field(default_factory=dict)  # of the settings, by their names in `Settings`
    scores: dict[str, Any] = field(default_factory=dict)  # what it reached, and how that was measured
    more: dict[str, Any] = field(default_factory=dict)  # whatever else it says: hardware, time, data

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a folder; an empty one where there is none."""
        path = folder / CARD
        if not path.exists():
            return cls()
        content = read_json(path)
        known: dict[str, Any] = {}
        for name, kind in {"knows": str, "words": list, "defaults": dict, "scores": dict}.items():
            if name in content and not isinstance(known.setdefault(name, content.pop(name)), kind):
                raise ValueError(f"model file '{path}' is damaged ({name} is no {kind.__name__}); correct it")
        known["words"] = tuple(known.get("words", ()))
        return cls(**known, more=content)

    def to_json(self) -> dict[str, JSON]:
        """As it stands in `unclip.json`."""
        content = {"knows": self.knows, "defaults": self.defaults, "scores": self.scores, **self.more}
        return content | ({"words": list(self.words)} if self.words else {})

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the model never saw; none where it does not say what it saw."""
        known = set(self.words)
        return [word for word in words_of(text) if known and word not in known]


def words_of(text: str) -> list[str]:
    """The words of a text as a card counts them: small letters and digits, parted by anything else."""
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
