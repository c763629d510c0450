"""A local cache that stands in for the hub."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0" * 40


def cached(root: Path, owner: str, name: str) -> Path:
    """Where a cache has the files of a repository, which is said to be there."""
    repository = root / f"models--{owner}--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT
