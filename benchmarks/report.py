"""What a benchmark leaves behind: a JSON file, and a table in markdown. Knows nothing of what was measured."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(found: Mapping[str, Any], path: Path) -> None:
    """Write what was found; it should hold `training.provenance.provenance`, so that it says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its heading first."""
    ruled = f"|{'---|' * len(columns)}"
    return "\n".join([line_of(columns), ruled, *(line_of(row) for row in rows)])


def line_of(cells: Sequence[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Median and range."""
    return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"
