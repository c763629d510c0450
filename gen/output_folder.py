"""A folder for what one run writes, which no other run shares, and one that is whole or not there."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from clip_core.wording import one_line


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` once it is whole; where that fails nothing is left of it.

    ValueError where `folder` is there already and not empty, or cannot be written.
    """
    target = folder.resolve()  # what a link names is filled, and not the link
    parents, filled = list[Path](), list[Path]()
    try:
        is_there = target.exists()
        if is_there and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{folder} is there already and not empty; give a new folder")
        # inside one that is there, for what holds it may not be ours to write
        partial = (target if is_there else target.parent) / f".{target.name}-{secrets.token_hex(4)}"
        for path in reversed([path for path in partial.parents if not path.exists()]):
            parents.append(path)  # first, as below, for Ctrl-C can come behind either
            path.mkdir()
        filled.append(partial)
        partial.mkdir()
        yield partial
        if is_there:
            for path in list(partial.iterdir()):
                filled.append(target / path.name)
                path.rename(target / path.name)
            partial.rmdir()
        else:
            partial.rename(target)
    except BaseException as error:  # Ctrl-C can come anywhere
        for path in filled:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # it was a folder, or is not there yet
                path.unlink()
        for path in reversed(parents):
            with suppress(OSError):  # it holds something, or is not there yet
                path.rmdir()
        if isinstance(error, OSError | SafetensorError):
            told = getattr(error, "strerror", None) or one_line(error)
            raise ValueError(f"folder '{folder}' cannot be written ({told}); choose another") from error
        raise


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
                told = f"out folder '{out}' cannot be written ({error.strerror or error})"
                raise ValueError(f"{told}; choose another with --out DIR") from None
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
