"""An example of training data before it is read, and the account of those that were left out.

What `folder.py` and `shards.py` find and `pictures.py` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


class DataError(ValueError):
    """The training data cannot be used; the message says what was found and what is needed."""


@dataclass(frozen=True)
class Example:
    """One captioned picture before it is read: a whole file, or `size` bytes at `offset` in one."""

    path: Path
    name: str  # for messages
    text: str
    group: str | None = None  # rows of one group meet in one contrastive batch
    offset: int = 0
    size: int | None = None  # None: to the end

    def content(self) -> bytes:
        """The encoded picture."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass
class Skipped:
    """What was left out of a data set, by reason, with the first name of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, name)

    def __str__(self) -> str:
        return "; ".join(
            f"{count} skipped: {reason} (first: {self.first[reason]})" for reason, count in self.counts.items()
        )
