"""What a benchmark's command line takes by name: precisions, and one line for a name that is unknown."""

from collections.abc import Collection, Sequence

import torch
import typer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def known(name: str, names: Collection[str], what: str) -> str:
    """The name; BadParameter where it is not among the names there are."""
    if name not in names:
        raise typer.BadParameter(f"{what} '{name}' is unknown; choose from: {', '.join(names)}")
    return name


def chosen(given: Sequence[str] | None, names: Collection[str], what: str) -> list[str]:
    """Those asked for, or all; BadParameter for what is unknown."""
    return [known(name, names, what) for name in given or names]
