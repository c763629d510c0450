"""The folder of a batch: pictures, and a line for each request that has been answered, so that a batch can go on.

Owns: its files, who writes there, and what counts as done. `batch.json` says by what model all is painted; the results
are JSON Lines, one file for each of several processes that share a batch. A line stands there when its pictures do, so
what ends in the middle, by Ctrl-C or worse, leaves no line and is painted anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from gen.manifest import Entry
from gen.record import Record
from gen.settings import JSON

PER_FOLDER = 1000  # lines whose pictures lie together, so that no folder grows unwieldy
PICTURE = re.compile(r"\.?(\d+)-")  # the line of a picture, or of one half written


@dataclass(frozen=True)
class BatchFolder:
    """A batch's files. `part` is which of several processes writes there, (2, 8) for the second of eight."""

    path: Path
    part: tuple[int, int] = (1, 1)

    @property
    def results(self) -> Path:
        """Where this process writes what became of its lines."""
        which, number = self.part
        return self.path / ("results.jsonl" if number == 1 else f"results-{which}of{number}.jsonl")

    def check(self, model: Record) -> None:
        """ValueError where the folder holds something else, or what another model paints."""
        card = self.path / "batch.json"
        if not card.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(f"out folder '{self.path}' holds something that is no batch; choose another")
            return
        try:
            begun = Record.from_json(json.loads(card.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{card} is damaged ({error}); choose another folder") from None
        if others := begun.differences(model):
            raise ValueError(
                f"out folder '{self.path}' was begun with another {others[0]}; give that, or another folder"
            )

    def done(self, entries: Collection[Entry]) -> dict[int, dict[str, Any]]:
        """What was answered, by line, by all processes. ValueError where a line asked for something else then."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.path.glob("results*.jsonl")):
            whole = path.read_bytes().split(b"\n")[:-1]  # the last line is one that is just being written, or was not
            for number, line in enumerate(whole, 1):
                try:
                    record = json.loads(line)
                    if "error" not in record:  # those are tried again
                        found[record["line"]] = record
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{path}:{number} is damaged; remove that line, and it is painted anew") from None
        for entry in entries:
            if entry.number in found and found[entry.number].get("request") != dict(entry.words):
                asked = f"line {entry.number} was asked for otherwise when out folder '{self.path}' was begun"
                raise ValueError(f"{asked}; give the same words or a new folder")
        return found

    @contextmanager
    def opened(self, model: Record) -> Iterator[IO[bytes]]:
        """The results to write to, by this process alone; a line that an end in the middle left half written is gone.

        ValueError where another process writes there, or the folder cannot be written.
        """
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(self.path / f".{self.results.name}.lock", timeout=0))
                self._write_card(model)
                file = held.enter_context(self.results.open("ab"))
            except Timeout:
                raise ValueError(f"another process writes to {self.results}; wait for it, or end it") from None
            except OSError as error:
                refused = f"out folder '{self.path}' cannot be written ({error.strerror})"
                raise ValueError(f"{refused}; choose another") from None
            file.truncate(self.results.read_bytes().rfind(b"\n") + 1)
            yield file

    def picture(self, line: int, place: int, seed: int) -> Path:
        """Where a picture of a line lies, the best in place 1; its folder is made."""
        path = self.path / "pictures" / f"{line // PER_FOLDER:03d}" / f"{line:06d}-{place}-seed{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def clear(self, entries: Iterable[Entry]) -> None:
        """Remove what an end in the middle left of lines that are not painted; of this process's lines, once opened."""
        numbers = {entry.number for entry in entries}
        for path in (self.path / "pictures").glob("*/*"):
            if (found := PICTURE.match(path.name)) and int(found[1]) in numbers:
                path.unlink()

    def _write_card(self, model: Record) -> None:
        card = self.path / "batch.json"
        if not card.exists():
            part = card.with_name(f".{card.name}.{os.getpid()}.part")
            part.write_text(json.dumps(model.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            part.replace(card)


def append(results: IO[bytes], line: Mapping[str, JSON]) -> None:
    """Write a line, and have the system keep it whatever becomes of this process."""
    results.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    results.flush()
