"""A batch: many requests of a manifest, painted together into a folder, gone on with where it was interrupted.

Owns: which requests the engine is handed and when, and what is written of their answers. All requests go through one
engine, so those of different settings share its network calls; a few wait in front of it, so that a manifest of a
hundred thousand lines takes no more memory than one of a hundred.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from clip_core.wording import one_line
from gen.answer import Result
from gen.batch_folder import BatchFolder, append
from gen.checks import refusal
from gen.counts import how_many
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
    def is_done(self) -> bool:
        """Whether all of its lines were painted, or failed."""
        return self.before + self.painted + self.failed == self.lines


class Batch:
    """A manifest, a model and a folder; whatever is wrong with the three is a ValueError before anything is painted.

    Of each line as many candidates are painted as it says, or 16, and as many are kept as it says, or 4 at most.
    """

    def __init__(
        self,
        model: TextToImage,
        manifest: str | Path | Sequence[Entry],
        out: str | Path,
        *,
        words: Mapping[str, Any] | None = None,  # of lines that say nothing else; files lie in the current folder
        part: tuple[int, int] = (1, 1),  # which lines: (2, 8) is the second of eight processes that share the folder
    ) -> None:
        which, number = part
        if not 1 <= which <= number:
            raise refusal("part", part, "which of how many, as (2, 8) or 2/8")
        entries = read_manifest(Path(manifest)) if isinstance(manifest, str | Path) else list(manifest)
        given = checked(words or {}, Path())
        self.folder = BatchFolder(Path(out), part)
        self.model = model
        self._entries = [_filled(entry, given, model) for entry in entries[which - 1 :: number]]
        self.folder.check(model.record)
        left = self._left()
        self.progress = Progress(len(self._entries), len(self._entries) - len(left))
        self._engine = model.engine()
        where = f"{manifest}:" if isinstance(manifest, str | Path) else "line "
        for entry in left:
            try:
                self._engine.check(entry.request())
            except ValueError as error:
                raise ValueError(f"{where}{entry.number}: {error}") from None

    def paint(self, note: Callable[[Progress], None] | None = None) -> Progress:
        """Paint what is not painted yet; `note` hears of every line that is through. Once.

        A line that fails is written as such, and the others go on. On Ctrl-C what is painted is written, and
        KeyboardInterrupt raised; another batch of the same folder goes on from there.
        """
        with self.folder.opened(self.model.record) as results, Writer() as writer:
            left = self._left()  # others may have painted since
            self.progress = replace(self.progress, before=len(self._entries) - len(left))
            self.folder.clear(left)
            run = _Run(self, results, note)
            try:
                run.paint(left, writer)
            finally:
                with deferred_interrupt():
                    self._engine.close(cancel=True)
                    run.write(writer, wait=True)
        return self.progress

    def _left(self) -> list[Entry]:
        done = self.folder.done(self._entries)
        return [entry for entry in self._entries if entry.number not in done]


class _Run:
    """A batch while it is painted."""

    def __init__(self, batch: Batch, results: IO[bytes], note: Callable[[Progress], None] | None) -> None:
        self._batch = batch
        self._results = results
        self._note = note
        self._entry_of: dict[Future[Result], Entry] = {}
        self._answered: deque[Future[Result]] = deque()
        self._unwritten: deque[tuple[list[Future[None]], dict[str, JSON]]] = deque()

    def paint(self, entries: Iterable[Entry], writer: Writer) -> None:
        engine, left = self._batch._engine, iter(entries)
        is_painting = True
        while is_painting:
            self._hand_over(left)
            is_painting = engine.tick()
            self.write(writer)

    def _hand_over(self, left: Iterator[Entry]) -> None:
        """Give the engine further requests while few wait there."""
        engine = self._batch._engine
        while engine.num_waiting < WAITING and (entry := next(left, None)) is not None:
            try:
                future = engine.submit(entry.request())
            except ValueError as error:  # of what is free now; all else was checked
                self._unwritten.append(([], _line(entry) | {"error": one_line(error)}))
                continue
            self._entry_of[future] = entry
            future.add_done_callback(self._answered.append)

    def write(self, writer: Writer, *, wait: bool = False) -> None:
        """Have the pictures of answers written, and the line of each whose pictures are there; `wait`: of all."""
        while self._answered:
            future = self._answered.popleft()
            entry = self._entry_of.pop(future)
            if not future.cancelled():
                self._unwritten.append(self._written(entry, future, writer))
        while self._unwritten:
            files, line = self._unwritten[0]
            if not (wait or len(self._unwritten) > UNWRITTEN or all(file.done() for file in files)):
                return
            for file in files:
                file.result()
            append(self._results, line)
            self._unwritten.popleft()
            self._count(line)

    def _written(
        self, entry: Entry, future: Future[Result], writer: Writer
    ) -> tuple[list[Future[None]], dict[str, JSON]]:
        """A line of the results, and the files that must be there first."""
        line = _line(entry)
        if (error := future.exception()) is not None:
            return [], line | {"error": one_line(error)}
        result = future.result()
        images, folder = result.images, self._batch.folder
        assert isinstance(images, list)  # Pillow's, for no line says otherwise
        files, pictures = list[Future[None]](), list[JSON]()
        for place, (image, record) in enumerate(zip(images, result.records, strict=True), 1):
            seed = result.seeds[place - 1]
            path = folder.picture(entry.number, place, seed)
            files.append(writer.write(image, path, record))
            score = None if result.scores is None else result.scores[place - 1]
            pictures.append({"path": str(path.relative_to(folder.path)), "score": score, "seed": seed})
        line |= {"pictures": pictures, "candidates": list[JSON](result.ranking()), "account": vars(result.account)}
        return files, line | self._unknown_words(result.prompts[0], result.records[0])

    def _unknown_words(self, prompt: str, record: Mapping[str, Any]) -> dict[str, JSON]:
        text = plain(prompt) if record["settings"]["prompt_weights"] else prompt
        found = self._batch.model.card.unknown_words(text)
        return {"unknown_words": list[JSON](found)} if found else {}

    def _count(self, line: Mapping[str, Any]) -> None:
        batch, before = self._batch, self._batch.progress
        if "error" in line:
            batch.progress = replace(before, failed=before.failed + 1)
        else:
            batch.progress = replace(
                before,
                painted=before.painted + 1,
                pictures=before.pictures + len(line["pictures"]),
                candidates=before.candidates + len(line["candidates"]),
            )
        if self._note is not None:
            self._note(batch.progress)


def _line(entry: Entry) -> dict[str, JSON]:
    """How a line of the results begins."""
    return {"line": entry.number, "id": entry.id, "request": dict(entry.words)}


def _filled(entry: Entry, words: Mapping[str, JSON], model: TextToImage) -> Entry:
    """A line with what it leaves out: what was given for all, and how many are painted and kept."""
    filled = {**words, **entry.words}
    is_ranked = model.model.abilities.can_rank and filled.get("rerank") is not False and "prompt" in filled
    n, keep = filled.get("num_images_per_prompt"), filled.get("keep")
    if isinstance(n, int | None) and isinstance(keep, int | None):  # else it is refused as it stands
        n, keep = how_many(n, keep, None, is_ranked=is_ranked)
        filled |= {"num_images_per_prompt": n, "keep": keep}
    return replace(entry, words={"seed": 0, **filled})
