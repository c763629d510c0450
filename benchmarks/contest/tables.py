"""A contest in markdown."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from contest.comparison import NOT_MEASURED, measured
from contest.ways import STOCK, WAYS
from report import markdown, spread


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of a contest; `stock takes` and `best peer takes` are beside the row, in its precision."""
    columns = ["contestant", "precision", "seconds, median (range)", "stock takes", "best peer takes", "peak MB"]
    columns += ["getting ready, s", "error of latents", "keeps the same (transformers, unclip)"]
    columns += ["of the roof"]
    lines = []
    for row in rows:
        line = [WAYS[row["way"]].label, row["dtype"]]
        if NOT_MEASURED in row:
            line += [f"not measured: {row[NOT_MEASURED]}", *[""] * (len(columns) - 3)]
        else:
            line += cells(row, [each for each in measured(rows) if each["dtype"] == row["dtype"]])
        lines.append(line)
    return markdown(columns, lines)


def cells(row: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a row's columns say; `alike` are all rows of its precision."""
    seconds, peaks = row["seconds"], [peak for peak in row["peak_memory_mb"] if peak is not None]
    stock = [each for each in alike if each["way"] == STOCK.way]
    peers = [each for each in alike if WAYS[row["way"]].is_ours and not WAYS[each["way"]].is_ours]
    return [
        spread(seconds),
        beside(row, stock),
        beside(row, peers),
        f"{max(peaks):.0f}" if peaks else "",
        f"{row['ready_seconds']:.1f}",
        f"{row['error']:.1e}",
        ", ".join("yes" if same else "no" for same in row["same_kept"].values()),
        f"{row['of_roof']:.0%}" if "of_roof" in row else "",
    ]


def beside(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """How many times as long as the row the fastest of others takes; empty where there is none."""
    if not others:
        return ""
    best = min(others, key=lambda each: median(each["seconds"]))
    return f"{median(best['seconds']) / median(row['seconds']):.2f}× ({best['way']})"


def profile_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of where the time went."""
    columns = list(next(iter(shares.values())))
    lines = ([name, *(f"{100 * each[column]:.1f} %" for column in columns)] for name, each in shares.items())
    return markdown(["share of wall time", *columns], lines)
