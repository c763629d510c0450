"""A folder for what one run writes, which no other run shares."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        folder = _make_folder(out, made)
        claim = tempfile.NamedTemporaryFile(prefix=".unclip-", dir=folder)  # noqa: SIM115 - closed below
    except OSError as error:
        _remove_empty(made)
        reason = error.strerror or str(error)
        raise ValueError(f"out folder '{out}' cannot be written ({reason}); choose another with --out DIR") from None
    try:
        with claim:
            yield folder
    except BaseException:
        _remove_empty(made)
        raise


def _make_folder(out: Path, made: list[Path]) -> Path:
    """`out`, or where it holds something its first free number, made with its parents; what was made is added."""
    while True:
        folder = out
        if out.is_dir() and any(out.iterdir()):
            folder = next(path for number in count(2) if not (path := out / f"{number:03d}").exists())
        try:
            for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
                path.mkdir()
                made.append(path)
            return folder
        except FileExistsError:  # another run was quicker
            if not folder.is_dir():
                raise


def _remove_empty(made: list[Path]) -> None:
    """Take away the folders that this run made, innermost first, as far as they are empty."""
    for path in reversed(made):
        try:
            path.rmdir()
        except OSError:
            return
