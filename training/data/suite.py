"""The committed test prompts of the Shapes, `shapes_test.jsonl`: what they are, how they are made and read.

Every prompt is held out of training by `shapes.held_out`. Groups: `one`, `relation`, `count` (held out by
their words alone), `held_out` (one object of a colour-shape pair that no training picture shows), and
`retrieval`: captions that name everything, no two true of one picture, each with the picture drawn from it.
Elsewhere sizes and backgrounds are named about as often as in training. The same file comes out on any
machine. Knows nothing of models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.shapes import (
    BACKGROUNDS,
    COUNT_WORDS,
    HELD_OUT_PAIRS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    Claim,
    Noun,
    has_held_out_pair,
    held_out,
    place,
    render,
)

SHAPES_TEST = Path(__file__).with_name("shapes_test.jsonl")
GROUPS = {"one": 60, "relation": 80, "count": 40, "held_out": 30}  # painted and checked
RETRIEVAL = {"one": 30, "relation": 45, "count": 25}  # captions by kind, as often as in training
_SEED = 20_250_101
_SAY_SIZE, _SAY_BACKGROUND = 0.7, 0.6  # how often a training caption names them

Draw = Callable[[], float]  # uniform in [0, 1)


@dataclass(frozen=True)
class Prompt:
    """One test prompt; `seed` (below 2^31) places a true picture's objects, and begins the painting."""

    id: str
    group: str
    claim: Claim
    seed: int

    @property
    def text(self) -> str:
        """The canonical wording."""
        return self.claim.text()

    def picture(self) -> NDArray[np.uint8]:
        """A true picture, (64, 64, 3); of a claim that names every size and the background."""
        return render(place(self.claim, random.Random(self.seed)))

    def to_json(self) -> str:
        """One line of the file."""
        fields = {"id": self.id, "group": self.group, "text": self.text, "seed": self.seed}
        return json.dumps({**fields, "claim": self.claim.to_json()})


def load(path: Path = SHAPES_TEST) -> list[Prompt]:
    """Read a prompt file; ValueError names the line that is not a prompt."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read ({error.strerror}); give an existing file") from None
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            claim = Claim.from_json(fields["claim"])
            prompt = Prompt(fields["id"], fields["group"], claim, fields["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not a test prompt ({error}); see {SHAPES_TEST.name}") from None
        if prompt.text != fields["text"]:
            raise ValueError(f"{path}:{number} says {fields['text']!r}, but its claim reads {prompt.text!r}")
        prompts.append(prompt)
    return prompts


def write(path: Path = SHAPES_TEST) -> None:
    """Make the file anew."""
    path.write_text("".join(prompt.to_json() + "\n" for prompt in make()), encoding="utf-8")


def make() -> list[Prompt]:
    """The prompts, always the same."""
    draw = random.Random(_SEED).random  # the one method that no Python version changes
    claims: dict[str, list[Claim]] = {}
    for group, number in GROUPS.items():
        source = _held_out_pairs(draw) if group == "held_out" else _random_claims(draw, group, everything=False)
        claims[group] = _distinct(source, number)
    named = [_distinct(_random_claims(draw, kind, everything=True), number) for kind, number in RETRIEVAL.items()]
    claims["retrieval"] = [claim for part in named for claim in part]
    return [
        Prompt(f"{group}-{number:03d}", group, claim, int(draw() * 2**31))
        for group, each in claims.items()
        for number, claim in enumerate(each)
    ]


def _distinct(source: Iterator[Claim], number: int) -> list[Claim]:
    """The first so many that no earlier one says in other words (`a above b`, `b below a`)."""
    seen: set[Claim] = set()

    def fresh(claim: Claim) -> bool:
        same = _turned(claim)
        new = not seen & {claim, same}
        seen.add(claim)
        return new

    return list(islice(filter(fresh, source), number))


def _turned(claim: Claim) -> Claim:
    """The claim told from its second object."""
    if claim.second is None or claim.relation is None:
        return claim
    step_x, step_y = RELATIONS[claim.relation]
    opposite = {step: name for name, step in RELATIONS.items()}[-step_x, -step_y]
    return replace(claim, first=claim.second, relation=opposite, second=claim.first)


def _random_claims(draw: Draw, kind: str, everything: bool) -> Iterator[Claim]:
    """Claims of one kind that are held out by their words; relations and counts take turns.

    `everything`: every size and the background are named.
    """
    turn = 0
    while True:
        count = tuple(COUNT_WORDS)[turn % len(COUNT_WORDS)] if kind == "count" else 1
        claim = Claim(_noun(draw, count, everything), count, background=_background(draw, everything))
        if kind == "relation":
            relation = tuple(RELATIONS)[turn % len(RELATIONS)]
            claim = replace(claim, relation=relation, second=_noun(draw, 1, everything))
        second = claim.second
        alike = second is not None and (claim.first.colour, claim.first.shape) == (
            second.colour,
            second.shape,
        )
        if held_out(claim) and not has_held_out_pair(claim) and not alike:
            turn += 1
            yield claim


def _held_out_pairs(draw: Draw) -> Iterator[Claim]:
    """One object of each pair in turn, sizes and backgrounds named or not in every way, in random order."""
    ways = list(product((None, *SIZES), (None, *BACKGROUNDS)))
    orders = [sorted(ways, key=lambda way: draw()) for _ in HELD_OUT_PAIRS]
    for number in range(len(ways)):
        for (colour, shape), order in zip(sorted(HELD_OUT_PAIRS), orders, strict=True):
            size, background = order[number]
            yield Claim(Noun(colour, shape, size), background=background)


def _noun(draw: Draw, count: int, everything: bool) -> Noun:
    size = "small" if count > 2 else _pick(draw, tuple(SIZES))
    named = draw() < _SAY_SIZE or everything
    return Noun(_pick(draw, tuple(PALETTE)), _pick(draw, SHAPES), size if named else None)


def _background(draw: Draw, everything: bool) -> str | None:
    name = _pick(draw, tuple(BACKGROUNDS))
    return name if draw() < _SAY_BACKGROUND or everything else None


def _pick(draw: Draw, options: Sequence[str]) -> str:
    return options[int(draw() * len(options))]
