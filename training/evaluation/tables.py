"""A result for people: tables in markdown, and lines for a model's card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.data.checker import FACTS

MEASURES = {
    "one": "one object right",
    "relation": "two objects with relation right",
    "held_out": "held-out colour-shape pairs, one object",
    "count": "counts of two to four right",
}


def measures(result: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """What is measured by painting, the option of its mode, and the rates of all candidates, the best and any."""
    for group, words in MEASURES.items():
        for mode, groups in result["painted"].items():
            if group in groups:
                yield words, _option(mode), [_cell(groups[group][name]) for name in ("all", "best", "any")]


def table(result: dict[str, Any]) -> str:
    """The result in markdown: what is measured, with 95 % intervals."""
    number = result["num_candidates"]
    lines = [
        f"| measure | mode | all candidates (= chance) | best of {number} by our CLIP | any of {number} |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {words} | `{option}` | {' | '.join(cells)} |" for words, option, cells in measures(result)]
    if found := result.get("retrieval"):
        words = f"CLIP text→image retrieval, top 1 of {found['captions']}"
        lines.append(f"| {words} | CLIP alone | | {_cell(found['text_to_image'])} | |")
    return "\n".join(lines)


def in_words(result: dict[str, Any]) -> dict[str, str]:
    """The result as lines for a model's card: measure and mode -> all candidates, best and any of N."""
    number = result["num_candidates"]
    lines = {"measured": f"{result['date'][:10]} on {result['on']}, weights as bundled, default settings"}
    for words, option, (all_, best, any_) in measures(result):
        lines[f"{words}, {option}"] = f"all candidates {all_}, best of {number} {best}, any of {number} {any_}"
    if found := result.get("retrieval"):
        lines[f"CLIP text to image retrieval, top 1 of {found['captions']}"] = _cell(found["text_to_image"])
    return lines


def fault_table(result: dict[str, Any]) -> str:
    """Which facts are wrong, in markdown: share of all candidates / of the chosen ones."""
    lines = [f"| wrong fact, all / best | {' | '.join(FACTS)} |", "|---" * (len(FACTS) + 1) + "|"]
    for mode, groups in result["painted"].items():
        for group, rates in groups.items():
            shares = [rates["faults"][kind] for kind in ("all", "best")]
            cells = [" / ".join(f"{100 * share[fact]:.0f}" for share in shares) for fact in FACTS]
            lines.append(f"| {group}, `{_option(mode)}`, % | {' | '.join(cells)} |")
    return "\n".join(lines)


def _option(mode: str) -> str:
    return f"--{mode.replace('_', '-')}"


def _cell(measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{100 * measure['rate']:.1f} % ({100 * low:.0f}–{100 * high:.0f})"
