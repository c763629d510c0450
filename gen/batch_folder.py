"""The folder of a batch: pictures, and a line for each request that has been answered, so that a batch can go on.

Owns: its files, who writes there, and what counts as done. `batch.json` says by what model all is painted; the results
are JSON Lines, one file for each of several processes that share a batch. A line stands there when its pictures do, so
what ends in the middle, by Ctrl-C or worse, leaves no line and is painted anew.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gen.manifest import Entry
from gen.record import Record
from gen.settings import JSON

PER_FOLDER = 1000  # lines whose pictures lie together, so that no folder grows unwieldy
PICTURE = re.compile(r"\.?0*(\d+)-\d+-seed\d+\.png(\.\d+\.part)?")  # the line of a picture, or of one half written
RESULTS = re.compile(r"results(-\d+of(\d+))?\.jsonl")  # of all lines, or of every so many


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

    @property
    def card(self) -> Path:
        """What is said of the model."""
        return self.path / "batch.json"

    def check(self, model: Record) -> None:
        """ValueError where the folder holds something else, or what another model paints."""
        try:
            begun = json.loads(self.card.read_text(encoding="utf-8"))
            others = Record.from_json(begun).differences(model) if isinstance(begun, dict) else ["everything"]
        except (FileNotFoundError, NotADirectoryError):
            self._check_empty()
            return
        except OSError as error:
            raise self._refusal("read", error) from None
        except ValueError as error:
            raise ValueError(f"{self.card} is damaged ({error}); choose another folder") from None
        if others:
            differs = f"'{self.path}' was begun by a model that differs in {', '.join(others)}"
            raise ValueError(f"out folder {differs}; give the same, or a new folder")

    def done(self, entries: Collection[Entry]) -> set[int]:
        """The lines that are painted, by any process; ValueError where one asked for something else then."""
        asked = {entry.number: dict(entry.words) for entry in entries}
        found: set[int] = set()
        for path in sorted(self.path.glob("results*.jsonl")):
            if not RESULTS.fullmatch(path.name):
                continue
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):  # it is just being written, or was not
                        continue
                    try:
                        result = json.loads(line)
                        painted, request, failed = result["line"], result["request"], "error" in result
                    except (ValueError, TypeError, KeyError):
                        advice = "remove that line, and it is painted anew"
                        raise ValueError(f"{path}:{number} is damaged; {advice}") from None
                    if failed:  # it is tried again
                        continue
                    found.add(painted)
                    if painted in asked and asked[painted] != request:
                        raise self._asked_otherwise(painted, asked[painted], request)
        return found

    @contextmanager
    def opened(self, model: Record) -> Iterator[io.FileIO]:
        """The results to write to, by this process alone; a line that an end in the middle left half written is gone.

        ValueError where another process writes there, or shares the lines in another way, where the folder cannot be
        written, and as `check` has it.
        """
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock(held)
                with FileLock(self.path / f".{self.card.name}.lock"):
                    self.check(model)  # another process may have begun it meanwhile
                    if not self.card.exists():
                        self._write_card(model)
                file = held.enter_context(self.results.open("ab", buffering=0))
            except OSError as error:
                raise self._refusal("written", error) from None
            file.truncate(_whole(self.results))
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
            if (found := PICTURE.fullmatch(path.name)) and int(found[1]) in numbers:
                path.unlink()

    def _lock(self, held: ExitStack) -> None:
        """Keep others from this process's results while they are held, and from lines shared in another way."""
        try:
            held.enter_context(FileLock(self.path / f".{self.results.name}.lock", timeout=0))
            # behind one's own, so that of two that come at once one sees it
            for path in self.path.glob(".results*.lock"):
                other = RESULTS.fullmatch(_locked_by(path))
                if other and int(other[2] or 1) != self.part[1]:
                    with FileLock(path, timeout=0):
                        pass
        except Timeout as error:
            busy = self.path / _locked_by(Path(error.lock_file))
            raise ValueError(f"another process writes to {busy}; wait for it, or end it") from None

    def _write_card(self, model: Record) -> None:
        part = self.card.with_name(f".{self.card.name}.{os.getpid()}.part")
        part.write_text(json.dumps(model.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        part.replace(self.card)

    def _check_empty(self) -> None:
        """ValueError where something lies here that is no batch's; hidden files may."""
        try:
            is_other = self.path.exists() and any(not each.name.startswith(".") for each in self.path.iterdir())
        except OSError as error:
            raise self._refusal("read", error) from None
        if is_other:
            raise ValueError(f"out folder '{self.path}' holds something that is no batch; choose another")

    def _asked_otherwise(self, line: int, now: Mapping[str, JSON], then: Mapping[str, JSON]) -> ValueError:
        names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        differs = f"line {line} asks for another {', '.join(names)} than when out folder '{self.path}' was begun"
        return ValueError(f"{differs}; give the same, or a new folder")

    def _refusal(self, done: str, error: OSError) -> ValueError:
        return ValueError(f"out folder '{self.path}' cannot be {done} ({error.strerror}); choose another")


def _locked_by(lock: Path) -> str:
    """The file that a lock is of."""
    return lock.name.removeprefix(".").removesuffix(".lock")


def append(results: io.FileIO, line: Mapping[str, JSON]) -> None:
    """Hand a line to the system, which keeps it whatever becomes of this process; OSError, with nothing written."""
    whole = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    end = results.seek(0, os.SEEK_END)
    try:
        written = results.write(whole)
        while written < len(whole):
            written += results.write(whole[written:])
    except OSError:
        results.truncate(end)
        raise


def _whole(path: Path) -> int:
    """The bytes of a file up to its last whole line."""
    with path.open("rb") as lines:
        return sum(len(line) for line in lines if line.endswith(b"\n"))
