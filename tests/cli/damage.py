"""A model folder with a part missing, cut short or not JSON."""

from __future__ import annotations

import shutil
from pathlib import Path


def spoil(model: Path, how: str) -> str:
    """Damage a part of a model ("PART missing", "PART cut", "PART damaged") and return the name that must be told."""
    part, _, what = how.partition(" ")
    path = model / part
    if what == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text('{"half": ')
    return path.name
