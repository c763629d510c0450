"""Outcomes of prompts, and the file that keeps each as soon as it is known: an interrupted evaluation goes on there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.data.suite import Prompt


@dataclass(frozen=True)
class Judged:
    """One painted candidate: its seed, CLIP's score, and the facts of its prompt that it gets wrong."""

    seed: int
    score: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One prompt in one mode; `candidates` best first, as CLIP ranks them."""

    prompt: str  # its id
    group: str
    mode: str
    seconds: float  # of painting, a share of the batch it was painted in
    candidates: tuple[Judged, ...]

    @property
    def right(self) -> list[bool]:
        """Per candidate, best first."""
        return [not candidate.faults for candidate in self.candidates]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Outcome:
        """From what `dataclasses.asdict` made of one."""
        each = [Judged(one["seed"], one["score"], tuple(one["faults"])) for one in fields["candidates"]]
        return cls(**{**fields, "candidates": tuple(each)})


class Ledger:
    """Outcomes on disk, one JSON line each, under a first line that says what is being evaluated."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open or begin; ValueError where the file belongs to another evaluation.

        A last line that an interruption left unfinished is dropped.
        """
        self.path = path
        self.outcomes: list[Outcome] = []
        try:
            whole = path.read_text(encoding="utf-8") if path.exists() else ""
            lines = whole[: whole.rfind("\n") + 1].splitlines()
            if not lines:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
                return
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}); give another folder") from None
        try:
            found = json.loads(lines[0])
            self.outcomes = [Outcome.from_json(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, or give another folder") from None
        other = [key for key in {**found, **header} if found.get(key) != header.get(key)]
        if other:
            key = other[0]
            difference = f"{key} {found.get(key)!r}, not {header.get(key)!r}"
            raise ValueError(f"{path} holds an evaluation of {difference}; remove it, or give another folder")
        if not whole.endswith("\n"):
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Keep outcomes; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
            file.flush()
            os.fsync(file.fileno())
        self.outcomes.extend(outcomes)

    def missing(self, prompts: Iterable[Prompt], mode: str) -> list[Prompt]:
        """The prompts that have no outcome in this mode yet."""
        done = {outcome.prompt for outcome in self.outcomes if outcome.mode == mode}
        return [prompt for prompt in prompts if prompt.id not in done]
