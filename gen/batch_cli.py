"""The verb batch: many prompts of a file into a folder.

Owns: its options and what is printed, as `gen.cli` does for the verbs of one prompt. Whatever is not the prompt is
typed as for `generate`, and said for all lines that say nothing else.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gen.model_cli import typed_model
from gen.options import with_options
from gen.wording import check_text, say, speaking

if TYPE_CHECKING:
    from gen.batch import Progress

SECONDS = 60  # between two lines on how far it is, where no bar is shown


@with_options("budget")
def batch(
    manifest: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="A .txt of one prompt a line, or a .jsonl of one request a line.")
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write, or to go on.")],
    part: Annotated[
        str, typer.Option(metavar="K/N", help="Every Nth line from the Kth on, where N processes share DIR.")
    ] = "1/1",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while it paints.")] = False,
    **words: Any,
) -> None:
    """Paint the requests of a file together, and write the best pictures of each into DIR.

    A line of a .jsonl is an object of Python's words, such as {"prompt": "a red star", "seed": 3}; options here are for
    lines that say nothing else. DIR/results.jsonl (of a part results-KofN.jsonl) has a line for each that is painted,
    with its pictures and the scores of all candidates. After Ctrl-C, or a crash, the same command goes on.
    """
    started = time.perf_counter()
    with speaking("batch"):
        check_text(*(word for word in words.values() if isinstance(word, str)))
        which = _part(part)
        from gen.batch import Batch
        from gen.manifest import read_manifest

        read_manifest(manifest)  # what is wrong there is told before a model is read
        model = typed_model("batch", words, quiet=quiet)
        rerank, diverse = words.pop("rerank"), words.pop("diverse")
        words |= {"rerank": None if rerank else False, "diverse": diverse or None}
        painted = Batch(model, manifest, out, words=words, part=which)
        loaded = time.perf_counter()
        interrupted = False
        with _shown(painted.progress, quiet=quiet) as note:
            try:
                painted.paint(note)
            except KeyboardInterrupt:
                interrupted = True
    from gen.checks import count_of

    progress = painted.progress
    answer = {
        "out": str(out),
        "results": str(painted.folder.results),
        **vars(progress),
        "interrupted": interrupted,
        "seconds": {
            "load": round(loaded - started, 3),
            "paint": round(time.perf_counter() - loaded, 3),
            "total": round(time.perf_counter() - started, 3),
        },
    }
    print(json.dumps(answer) if as_json else _summary(answer))
    if interrupted:
        say("batch", "interrupted; the same command goes on from here")
        raise typer.Abort  # so that no more is said of it
    if progress.failed:
        lines = count_of(progress.lines, "line")
        say("batch", f"{progress.failed} of {lines} failed; {painted.folder.results} says why")
        raise typer.Exit(1)


def _part(given: str) -> tuple[int, int]:
    """K/N as numbers; ValueError where it is no such thing."""
    from gen.batch import check_part

    if not (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", given)):
        raise ValueError(f"--part '{given}' is not K/N; give which of how many, as 2/8")
    check_part(which := int(found[1]), number := int(found[2]))
    return which, number


@contextmanager
def _shown(begun: "Progress", *, quiet: bool) -> Iterator["Callable[[Progress], None]"]:
    """What shows how far a batch is: a bar in a terminal, elsewhere a line each minute, or nothing."""
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        from gen.progress import bar

        with bar() as shown:
            task = shown.add_task("lines", total=begun.lines, completed=begun.through)
            yield lambda progress: shown.update(task, completed=progress.through)
    else:
        last = time.monotonic()

        def note(progress: "Progress") -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS:
                last = time.monotonic()
                say("batch", f"{progress.through} of {progress.lines} lines, {progress.pictures} pictures")

        yield note


def _summary(answer: dict[str, Any]) -> str:
    """What is printed for people."""
    from gen.checks import count_of

    lines, before = count_of(answer["lines"], "line"), f", {answer['before']} before" if answer["before"] else ""
    counts = f"{count_of(answer['candidates'], 'candidate')}, {count_of(answer['pictures'], 'picture')} kept"
    took = f"{answer['seconds']['paint']:.1f} s ({answer['seconds']['load']:.1f} s to load)"
    return f"{answer['results']}  {answer['painted']} of {lines} painted{before}: {counts}, in {took}"
