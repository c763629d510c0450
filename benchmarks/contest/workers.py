"""Contestants in processes of their own, which do nothing while they are not asked."""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import diffusers
import transformers

from contest.tasks import Task
from contest.turns import operations, profile, ready, turn
from contest.ways import Entrant
from gauges import roof
from gen.runtime import DTYPES

# What a contestant's process can be asked; tensors go between processes as arrays.
ASKED: dict[str, Callable[..., Any]] = {
    "turn": turn,
    "latents": lambda contestant: contestant.latents().float().cpu().numpy(),
    "pictures": lambda contestant: contestant.pictures(),
    "rank": lambda contestant, pictures: contestant.rank(pictures),
    "profile": profile,
    "operations": operations,
    "roof": lambda contestant, dtype: roof(contestant.task.device, DTYPES[dtype]),
}


def quiet() -> None:
    """Let the libraries say nothing while they load and save."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # the new name is not known to 0.38


@dataclass(frozen=True)
class Raised:
    """What went wrong in a contestant's process."""

    trace: str


def serve(line: Connection, entrant: Entrant, task: Task) -> None:
    """The life of a contestant's process: it gets ready, says so, and does what it is asked until told None."""
    quiet()
    try:
        contestant, prepared = ready(entrant, task)
        line.send(prepared)
        while (asked := line.recv()) is not None:
            name, *arguments = asked
            line.send(ASKED[name](contestant, *arguments))
    except Exception:
        line.send(Raised(traceback.format_exc()))


class Worker:
    """A contestant in a process of its own, which does nothing while it is not asked."""

    def __init__(self, entrant: Entrant, task: Task) -> None:
        self.name = " ".join(entrant)
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, entrant, task))
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._process.is_alive():
            self._line.send(None)
        else:
            self._process.terminate()
        self._process.join()

    def ask(self, name: str, *arguments: object) -> Any:
        """What the contestant answers; RuntimeError where it failed."""
        self._line.send((name, *arguments))
        return self.answer()

    def answer(self) -> Any:
        """The next thing it says; the first is how it got ready."""
        try:
            received = self._line.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} died with exit status {self._process.exitcode}") from None
        if isinstance(received, Raised):
            raise RuntimeError(f"{self.name}: {received.trace}")
        return received
