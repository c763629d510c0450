r"""Prompts in which some words count more than others: `(word:1.3)`, `(word)`, `[word]`.

The grammar that most users of Stable Diffusion know: round brackets multiply by the number behind the colon, or by 1.1;
square ones divide by 1.1; they nest; a backslash before a bracket or a backslash means that character. Nothing here
knows models or tokens.

A number between a colon and a closing round bracket is always a weight, whatever the words before: `(a ratio 3:4)` says
"a ratio 3" with weight 4, as in other programs, and `(a ratio 3:4:1.1)` or `\(a ratio 3:4\)` says the ratio. What looks
like a weight and is none, such as `(red:1,3)` or `[red:1.3]`, is refused: as words nobody would see that it counts for
nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEP = 1.1  # what a pair of brackets without a number multiplies by, or divides by
MOST = 10.0  # a weight is from 0 to this

TOKEN = re.compile(
    r"\\[\\()\[\]]"
    r"|:\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\)"  # a weight
    r"|:\s*([+-]*[.,]?\d[\d.,eE+%_\s-]*)([)\]])"  # what looks like one
    r"|[()\[\]]|[^\\()\[\]:]+|[:\\]"
)
CLOSES = {")": "(", "]": "["}


@dataclass(frozen=True)
class WeightedText:
    """Words that count alike."""

    text: str
    weight: float = 1.0


def parse(name: str, text: str) -> tuple[WeightedText, ...]:
    """The parts of a text in their order; ValueError for brackets that do not pair and weights that are none."""
    found: list[WeightedText] = []
    open_: list[tuple[str, int]] = []  # brackets, and how many parts were found before each

    def close(bracket: str, factor: float) -> None:
        if not open_ or open_[-1][0] != bracket:
            raise ValueError(f"{name} {text!r} has a closing bracket that none opens; write \\) or \\] for itself")
        if factor < 0:
            raise ValueError(f"{name} {text!r} gives the weight {factor:g}; give 0 to {MOST:g}")
        _, first = open_.pop()
        found[first:] = [WeightedText(part.text, part.weight * factor) for part in found[first:]]

    for match in TOKEN.finditer(text):
        token = match[0]
        if token in ("(", "["):
            open_.append((token, len(found)))
        elif match[1] is not None:
            close("(", float(match[1]))
        elif match[2] is not None:
            close(CLOSES[match[3]], 1.0)
            problem = f"'{match[2].strip()}', which is no weight" if match[3] == ")" else "a number in square brackets"
            way = f"write it as in (word:1.3), or \\{CLOSES[match[3]]} and \\{match[3]} for the brackets themselves"
            raise ValueError(f"{name} {text!r} has {problem}; {way}")
        elif token in CLOSES:
            close(CLOSES[token], STEP if token == ")" else 1 / STEP)
        else:
            found.append(WeightedText(token[1:] if len(token) == 2 and token[0] == "\\" else token))
    if open_:
        raise ValueError(f"{name} {text!r} has '{open_[-1][0]}' that is not closed; write \\{open_[-1][0]} for itself")
    if wrong := [part for part in found if not part.weight <= MOST]:
        raise ValueError(f"{name} gives {wrong[0].text!r} the weight {wrong[0].weight:g}; give 0 to {MOST:g}")
    return _joined(found)


def plain(text: str) -> str:
    """A text without its weights, as CLIP and a prior read it."""
    return "".join(part.text for part in parse("prompt", text))


def _joined(parts: list[WeightedText]) -> tuple[WeightedText, ...]:
    joined: list[WeightedText] = []
    for part in parts:
        if joined and joined[-1].weight == part.weight:
            joined[-1] = WeightedText(joined[-1].text + part.text, part.weight)
        else:
            joined.append(part)
    return tuple(joined)
