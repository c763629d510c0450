"""What a benchmark is asked: the sentence that is painted, and one line for a name that is unknown.

Knows nothing of models: `speed.py` reads the peaks of processes that it starts, and these count what it held itself.
"""

from collections.abc import Collection, Sequence

import typer

PROMPT = "a small red circle above a large blue square"


def known(name: str, names: Collection[str], what: str) -> str:
    """The name; BadParameter where it is not among the names there are."""
    if name not in names:
        raise typer.BadParameter(f"{what} '{name}' is unknown; choose from: {', '.join(names)}")
    return name


def chosen(given: Sequence[str] | None, names: Collection[str], what: str) -> list[str]:
    """Those asked for, or all; BadParameter for what is unknown."""
    return [known(name, names, what) for name in given or names]
