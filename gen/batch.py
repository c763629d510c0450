"""A batch: many requests of a manifest, painted together into a folder, gone on with where it was interrupted.

Owns: which requests the engine is handed and when, and what is written of their answers. All requests go through one
engine, so those of different settings share its network calls; a few wait in front of it, and answers are let go of as
they are written, so that a manifest of a hundred thousand lines takes little more memory than one of a hundred.
"""

from __future__ import annotations

import io
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_core.wording import one_line
from gen.answer import Result
from gen.batch_folder import BatchFolder, append
from gen.counts import how_many
from gen.engine import Engine
from gen.interrupt import deferred_interrupt
from gen.manifest import Entry, checked, read_manifest
from gen.picture import Writer
from gen.pipeline import TextToImage
from gen.prompts import plain
from gen.settings import JSON

WAITING = 32  # requests in front of the engine; their texts are read together
UNWRITTEN = 64  # answers whose files are being written, before painting waits for them


@dataclass(frozen=True)
class Progress:
    """How far a batch is."""

    lines: int  # that this process is to have painted
    before: int  # of them painted when it began
    painted: int = 0  # since then
    failed: int = 0  # since then, and written as such
    pictures: int = 0  # written since then
    candidates: int = 0  # painted since then

    @property
    def through(self) -> int:
        """Lines that nothing more is done for."""
        return self.before + self.painted + self.failed

    @property
    def is_done(self) -> bool:
        """Whether all lines are through."""
        return self.through == self.lines


class Batch:
    """A manifest, a model and a folder; whatever is wrong with the three is a ValueError before anything is painted.

    Where neither a line nor `words` says so, 16 candidates of it are painted, from seed 0 on, and the best 4 kept. In
    both None says nothing.
    """

    def __init__(
        self,
        model: TextToImage,
        manifest: str | Path,  # see `gen.manifest.read_manifest`
        out: str | Path,
        *,
        words: Mapping[str, Any] | None = None,  # of a request, for lines that say nothing else; files lie in the cwd
        part: tuple[int, int] = (1, 1),  # which lines: (2, 8) is the second of eight processes that share the folder
    ) -> None:
        check_part(*part)
        which, number = part
        common = checked(words or {}, Path())
        self.model = model
        self.folder = BatchFolder(Path(out), part)
        entries = read_manifest(Path(manifest))[which - 1 :: number]
        self._entries = [_filled(entry, common, model) for entry in entries]
        self.folder.check(model.record)
        left = self._left()
        self.progress = Progress(len(self._entries), len(self._entries) - len(left))
        engine = model.engine()
        for entry in left:
            if problem := _problem(engine, entry):
                is_common = problem == _problem(engine, _filled(Entry(0, {"prompt": "any"}), common, model))
                raise ValueError(problem if is_common else f"{manifest}:{entry.number}: {problem}")

    def paint(self, note: Callable[[Progress], None] | None = None) -> Progress:
        """Paint what is not painted yet; `note` hears of every line that is through.

        A line that fails is written as such, and the others go on. On Ctrl-C what is painted is written, and
        KeyboardInterrupt raised; another batch of the same folder goes on from there. ValueError where another process
        writes to the folder, OSError where no more can be written.
        """
        engine = self.model.engine()
        with self.folder.opened(self.model.record) as results, Writer() as writer:
            left = self._left()  # others may have painted since
            self.progress = Progress(len(self._entries), len(self._entries) - len(left))
            self.folder.clear(left)
            painting = _Painting(self, engine, results, writer)
            try:
                painting.run(left, note)
            finally:
                with deferred_interrupt():
                    engine.close(cancel=True)
                    painting.write(wait=True)
        return self.progress

    def _left(self) -> list[Entry]:
        done = self.folder.done(self._entries)
        return [entry for entry in self._entries if entry.number not in done]


class _Painting:
    """A batch's requests on their way through the engine to their files."""

    def __init__(self, batch: Batch, engine: Engine[Result], results: io.FileIO, writer: Writer) -> None:
        self._batch = batch
        self._engine = engine
        self._results = results
        self._writer = writer
        self._entry_of: dict[Future[Result], Entry] = {}
        self._answered: deque[Future[Result]] = deque()
        self._unwritten: deque[tuple[list[Future[None]], dict[str, JSON]]] = deque()

    def run(self, entries: Iterable[Entry], note: Callable[[Progress], None] | None) -> None:
        left = iter(entries)
        while self._hand_over(left) | self._engine.tick():  # both, whatever the first says
            self.write(note)
        self.write(note, wait=True)

    def _hand_over(self, left: Iterator[Entry]) -> bool:
        """Give the engine further requests while few wait there; whether there may be more."""
        while self._engine.num_waiting < WAITING and len(self._unwritten) < UNWRITTEN:
            if (entry := next(left, None)) is None:
                return False
            try:
                future = self._engine.submit(entry.request())
            except ValueError as error:  # of what has changed since it was checked: what is free, or a file
                self._unwritten.append(([], _line(entry) | {"error": one_line(error)}))
                continue
            self._entry_of[future] = entry
            future.add_done_callback(self._answered.append)
        return True

    def write(self, note: Callable[[Progress], None] | None = None, *, wait: bool = False) -> None:
        """Have the pictures of answers written, and the line of each whose pictures are there; `wait`: of all."""
        while self._answered:
            future = self._answered.popleft()
            entry = self._entry_of.pop(future)
            if not future.cancelled():
                self._unwritten.append(self._written(entry, future))
        while self._unwritten:
            files, line = self._unwritten[0]
            if not (wait or len(self._unwritten) >= UNWRITTEN or all(file.done() for file in files)):
                return
            for file in files:
                file.result()
            with deferred_interrupt() as came:
                self._unwritten.popleft()
                append(self._results, line)
                self._batch.progress = _counted(self._batch.progress, line)
            if note is not None:
                note(self._batch.progress)
            if came():
                signal.raise_signal(signal.SIGINT)  # to who hears it now

    def _written(self, entry: Entry, future: Future[Result]) -> tuple[list[Future[None]], dict[str, JSON]]:
        """A line of the results, and the files that must be there first."""
        line = _line(entry)
        if (error := future.exception()) is not None:
            return [], line | {"error": one_line(error)}
        result, folder = future.result(), self._batch.folder
        assert isinstance(result.images, list)  # Pillow's, for no line says otherwise
        files, pictures = list[Future[None]](), list[JSON]()
        scores: list[float | None] = [*result.scores] if result.scores else [None] * len(result.seeds)
        for place, (image, record, seed, score) in enumerate(
            zip(result.images, result.records, result.seeds, scores, strict=True), 1
        ):
            path = folder.picture(entry.number, place, seed)
            files.append(self._writer.write(image, path, record))
            pictures.append({"path": path.relative_to(folder.path).as_posix(), "score": score, "seed": seed})
        line |= {"pictures": pictures, "candidates": list[JSON](result.ranking()), "account": vars(result.account)}
        return files, line | self._unknown_words(result.records[0])

    def _unknown_words(self, record: Mapping[str, Any]) -> dict[str, JSON]:
        """The words of a prompt that the model never saw, if there are any."""
        text = plain(record["prompt"]) if record["settings"]["prompt_weights"] else record["prompt"]
        found = self._batch.model.card.unknown_words(text)
        return {"unknown_words": list[JSON](found)} if found else {}


def check_part(which: int, number: int) -> None:
    """ValueError where a process cannot be this one of so many."""
    if not 1 <= which <= number:
        raise ValueError(f"part {which}/{number} is out of range; give which of how many, as 2/8")


def _problem(engine: Engine[Result], entry: Entry) -> str:
    """Why a line cannot be painted; empty where it can."""
    if not entry.words.keys() & {"prompt", "variation_of"}:
        return "prompt is missing; say in words what to paint"
    try:
        engine.check(entry.request())
    except ValueError as error:
        return str(error)
    return ""


def _counted(progress: Progress, line: Mapping[str, Any]) -> Progress:
    """With one more line."""
    if "error" in line:
        return replace(progress, failed=progress.failed + 1)
    return replace(
        progress,
        painted=progress.painted + 1,
        pictures=progress.pictures + len(line["pictures"]),
        candidates=progress.candidates + len(line["candidates"]),
    )


def _line(entry: Entry) -> dict[str, JSON]:
    """How a line of the results begins."""
    return {"line": entry.number, "id": entry.id, "request": dict(entry.words)}


def _filled(entry: Entry, common: Mapping[str, JSON], model: TextToImage) -> Entry:
    """A line with what it leaves out: what is said for all, and how many are painted and kept."""
    words = {"seed": 0, **common, **entry.words}
    is_ranked = model.model.abilities.can_rank and words.get("rerank") is not False and "prompt" in words
    n, keep = words.get("num_images_per_prompt"), words.get("keep")
    if isinstance(n, int | None) and isinstance(keep, int | None):  # else it is refused as it stands
        n, keep = how_many(n, keep, None, is_ranked=is_ranked)
        words |= {"num_images_per_prompt": n, "keep": keep}
    return replace(entry, words=words)
