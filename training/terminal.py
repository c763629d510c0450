"""A training run at a terminal: what it shows there, and that Ctrl-C is heard by the loop alone."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Show = Callable[[int, dict[str, float], float], None]
"""show(step, losses, seconds)"""


@contextmanager
def bar(shown: bool, name: str, step: int, steps: int) -> Iterator[Show]:
    """A progress bar on a terminal, a line every so often in a log file, nothing when not asked for."""
    console = Console(stderr=True)
    if not shown:
        yield lambda *_: None
    elif not console.is_terminal:
        yield lambda step, values, seconds: logger.info(
            "%s %d/%d %.0f s  %s",
            name,
            step,
            steps,
            seconds,
            "  ".join(f"{key} {value:.4f}" for key, value in values.items()),
        )
    else:
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            handle = progress.add_task(name, total=steps, completed=step, note="")

            def show(step: int, values: dict[str, float], seconds: float) -> None:
                progress.update(handle, completed=step, note=f"loss {values['loss']:.4f}")

            yield show


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the processes that read data too; they stop when the training process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
