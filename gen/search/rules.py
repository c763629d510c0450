"""The searches, each a generator over one prompt's candidates; see `gen.search.field`.

Previews are cheap looks at what a picture is about to be, so they are compared with previews of the same step alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from gen.search.field import Asked, Field, Go, Moves, Scout, Search

ROUND = 16  # candidates that a budget spends at once, at most


def best(scores: Mapping[int, float], number: int) -> list[int]:
    """The candidates with the highest scores, best first; of equals the earlier one."""
    return sorted(scores, key=lambda index: (-scores[index], index))[:number]


def previewed(field: Field, candidates: Sequence[int]) -> dict[int, float]:
    """How the previews of these candidates score."""
    return dict(zip(candidates, field.previews(candidates), strict=True))


def steps_of(share: float, num_steps: int) -> int:
    """A share of the steps as a whole number of them, one at least."""
    return max(1, round(share * num_steps))


def check_chooses(name: str, asked: Asked) -> None:
    """ValueError where nothing may be given up."""
    if asked.keep >= asked.num_candidates:
        raise ValueError(
            f"search '{name}' gives candidates up, but keep={asked.keep} of {asked.num_candidates} keeps them all; "
            "give a smaller keep, or search='best_of'"
        )


def check_share(name: str, what: str, share: float) -> None:
    """ValueError unless a share lies between 0 and 1."""
    if not 0 < share < 1:
        raise ValueError(f"search '{name}': {what} {share!r} is out of range; give a share between 0 and 1")


@dataclass(frozen=True)
class BestOf:
    """All are painted (Ramesh et al. 2021, section 2.6)."""

    name = "best_of"

    def check(self, asked: Asked) -> None:
        """It works on anything."""

    def __call__(self, field: Field) -> Moves:
        """Every candidate to its end."""
        yield Go(field.candidates)


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016, Figure 1): at every rung the better half goes on."""

    rungs: tuple[float, ...] = (0.3, 0.5, 0.7)  # shares of the decoder's steps
    goes_on: float = 0.5  # of those at a rung, and never fewer than are to be kept

    name = "halving"

    def __post_init__(self) -> None:
        for rung in self.rungs:
            check_share(self.name, "rung", rung)
        check_share(self.name, "goes_on", self.goes_on)

    def check(self, asked: Asked) -> None:
        """Some have to be given up."""
        check_chooses(self.name, asked)

    def __call__(self, field: Field) -> Moves:
        """From rung to rung; the previews of a rung choose."""
        here = list(field.candidates)
        for step in sorted({steps_of(rung, field.num_steps) for rung in self.rungs}):
            number = max(field.keep, ceil(self.goes_on * len(here)))
            if step >= field.num_steps or number >= len(here):
                break
            yield Go(here, until=step)
            chosen = sorted(best(previewed(field, here), number))
            field.drop([index for index in here if index not in chosen])
            here = chosen
        yield Go(here)


@dataclass(frozen=True)
class Draft:
    """A draft of every candidate in few steps from the noise it would begin with; the best are then painted whole."""

    steps: float = 0.25  # of a draft, as a share of the decoder's
    goes_on: float = 0.25  # of the candidates, and never fewer than are to be kept

    name = "draft"

    def __post_init__(self) -> None:
        check_share(self.name, "steps", self.steps)
        check_share(self.name, "goes_on", self.goes_on)

    def check(self, asked: Asked) -> None:
        """Some have to be given up."""
        check_chooses(self.name, asked)

    def __call__(self, field: Field) -> Moves:
        """Drafts of all, pictures of the best."""
        here = list(field.candidates)
        number = max(field.keep, ceil(self.goes_on * len(here)))
        if number < len(here):
            yield Scout(here, steps_of(self.steps, field.num_steps))
            chosen = sorted(best(previewed(field, here), number))
            field.drop([index for index in here if index not in chosen])
            here = chosen
        yield Go(here)


def in_rounds(search: Search, field: Field) -> Moves:
    """A search in rounds until no further one fits the budget; the first is of one candidate, so that there is one.

    What a candidate takes is measured on the round before, previews, decoding and scores included.
    """
    rest, size = list(field.candidates), 1
    while size > 0 and rest:
        here, rest = rest[:size], rest[size:]
        before = field.seconds_left()
        yield from search(field.among(here))
        left = field.seconds_left()
        each = (before - left) / len(here)
        most = max(ROUND, field.keep)
        size = min(most, int(left / each)) if each > 0 else most


SEARCHES: dict[str, Search] = {search.name: search for search in (BestOf(), Halving(), Draft())}


def by_name(search: str | Search) -> Search:
    """The search of this name as it comes, or one that was made; ValueError for an unknown name."""
    if not isinstance(search, str):
        return search
    if search not in SEARCHES:
        raise ValueError(f"search '{search}' is unknown; choose from: {', '.join(sorted(SEARCHES))}")
    return SEARCHES[search]
