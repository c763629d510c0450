"""A folder that is written whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ValueError(f"folder '{folder}' cannot be written ({reason}); choose another") from error
        raise
