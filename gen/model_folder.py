"""Where a model's folder is: one that comes with the package, one on disk, or a hub's repository, fetched."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from clip_core.hub import HUB_ERRORS
from clip_core.weights import read_json
from clip_core.wording import one_line
from gen.card import CARD
from gen.hub import download
from gen.model_index import INDEX, listed

ASSETS = Path(__file__).parent / "assets"
LICENCES = ("LICENSE*", "LICENCE*", "License*")


def find(name_or_path: str | Path, parts: Collection[str] | None = None) -> Path:
    """The folder of a bundled name, a path or a hub id; ValueError where there is none.

    `parts` are those that are fetched of a hub's repository; None: all that its index lists and that are used here.
    """
    name = str(name_or_path)
    if "/" not in name and (ASSETS / name / INDEX).exists():
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"model '{name}' is a single file; give a folder that diffusers saved")
    if path.is_dir():
        if not (path / INDEX).exists():
            raise ValueError(f"model folder '{name}' has no {INDEX}; give a folder that diffusers saved")
        return path
    names = name.split("/")
    if len(names) == 2 and all(names) and not name.startswith((".", "~")):
        return fetched(name, parts)
    raise ValueError(
        f"model '{name}' is unknown; give a bundled name ({', '.join(bundled())}), "
        "a diffusers folder that exists, or a hub id such as owner/name"
    )


def fetched(repo: str, parts: Collection[str] | None) -> Path:
    """The local copy of a hub repository."""
    try:
        return download(repo, INDEX, [CARD, *LICENCES], lambda path: [*(parts or (*listed(read_json(path)), "clip"))])
    except HUB_ERRORS as error:
        raise ValueError(
            f"model '{repo}' is no folder here and cannot be fetched from the hub ({one_line(error)}); "
            f"check the name, or use a bundled one ({', '.join(bundled())})"
        ) from error


def bundled() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INDEX}"))
