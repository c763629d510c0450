"""A folder for what one run writes, which no other run shares."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder for this run alone, proved writable before any work; gone again when nothing came into it.

    `out` itself where it is new or empty, else the first free of `out/002`, `out/003`, ... A hidden file holds
    it meanwhile, so that a run which starts before this one has written anything takes another.
    """
    made: list[Path] = []
    try:
        with ExitStack() as held:
            try:
                folder = _make_folder(out, made)
                held.enter_context(tempfile.NamedTemporaryFile(prefix=".unclip-", dir=folder))
            except OSError as error:
                problem = f"out folder '{out}' cannot be written ({error.strerror or error})"
                raise ValueError(f"{problem}; choose another with --out DIR") from None
            yield folder
    except BaseException:  # Ctrl-C can come anywhere
        for path in reversed(made):
            with suppress(OSError):  # it holds something, or is not there yet
                path.rmdir()
        raise


def _make_folder(out: Path, made: list[Path]) -> Path:
    """`out`, or where it holds something its first free number, made with its parents; what was made is added."""
    while True:
        folder = out
        if out.is_dir() and any(out.iterdir()):
            folder = next(path for number in count(2) if not (path := out / f"{number:03d}").exists())
        try:
            for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
                made.append(path)  # first, for Ctrl-C can come behind either
                path.mkdir()
            return folder
        except FileExistsError:  # another run was quicker
            made.pop()
            if not folder.is_dir():
                raise
