"""The searches, each a generator over one prompt's candidates; see `gen.search.field`.

Previews are cheap looks at what a picture is about to be, so they are compared with previews of the same step alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from scipy.special import stdtr
from torch import Tensor

from gen.search.field import Field, Go, Moves, Scout, Search, SearchContext

ROUND = 16  # candidates that a budget spends at once, at most
SPARE = 1.25  # pictures painted for each that is kept: drafts do not tell the order among the best
DRAFTED = 0.3  # of the decoder's steps, in a draft
GROWTH = 4  # times as many candidates in a round as in the one before, at most
PLANNED = 0.9  # of the seconds left, what a round is planned to take
LINE = 4  # finished candidates before a line through them is trusted
RESAMPLING = 0x27D4EB2F  # added to a seed for what resampling draws; a prime of xxHash, as those of `samplers.noise`


def best(scores: Mapping[int, float], number: int) -> list[int]:
    """The candidates with the highest scores, best first; of equals the earlier one."""
    return sorted(scores, key=lambda index: (-scores[index], index))[:number]


def previewed(field: Field, candidates: Sequence[int]) -> dict[int, float]:
    """How the previews of these candidates score."""
    return dict(zip(candidates, field.previews(candidates), strict=True))


def narrowed(field: Field, candidates: Sequence[int], number: int) -> list[int]:
    """Those whose previews score best; the others are given up."""
    chosen = sorted(best(previewed(field, candidates), number))
    field.drop([index for index in candidates if index not in chosen])
    return chosen


def steps_of(share: float, num_steps: int) -> int:
    """A share of the steps as a whole number of them, one at least."""
    return max(1, round(share * num_steps))


def check_chooses(name: str, asked: SearchContext) -> None:
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

    def check(self, asked: SearchContext) -> None:
        """It works on anything."""

    def __call__(self, field: Field) -> Moves:
        """Every candidate to its end."""
        yield Go(field.candidates)


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016, Figure 1): at every rung the better half goes on."""

    rungs: tuple[float, ...] = (0.8, 0.9)  # shares of the decoder's steps; before, estimates say little of the picture
    goes_on: float = 0.5  # of those at a rung, and never fewer than are to be kept

    name = "halving"

    def __post_init__(self) -> None:
        for rung in self.rungs:
            check_share(self.name, "rung", rung)
        check_share(self.name, "goes_on", self.goes_on)

    def check(self, asked: SearchContext) -> None:
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
            here = narrowed(field, here, number)
        yield Go(here)


@dataclass(frozen=True)
class Draft:
    """A draft of every candidate in few steps from the noise it would begin with; the best are then painted whole."""

    steps: float | None = None  # a draft's, as a share of the decoder's; None: its network for drafts', else 0.3
    goes_on: float = 0.1  # of the candidates, and never fewer than `SPARE` times those to be kept

    name = "draft"

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_share(self.name, "steps", self.steps)
        check_share(self.name, "goes_on", self.goes_on)

    def check(self, asked: SearchContext) -> None:
        """Some have to be given up."""
        check_chooses(self.name, asked)

    def __call__(self, field: Field) -> Moves:
        """Drafts of all, pictures of the best."""
        here = list(field.candidates)
        number = max(ceil(SPARE * field.keep), ceil(self.goes_on * len(here)))
        if number < len(here):
            by_drafter = self.steps is None and field.has_drafter
            yield Scout(here, None if by_drafter else steps_of(self.steps or DRAFTED, field.num_steps))
            here = narrowed(field, here, number)
        yield Go(here)


@dataclass(frozen=True)
class Racing:
    """Pictures are finished in the order of their previews until it is unlikely that any of the others would be kept.

    All are taken to the rung. From the candidates that are finished a straight line is fitted, final score over preview
    score; that the order goes by previews alone leaves such a fit unbiased. Errors about the line taken as normal and
    of one size, what a further candidate would score has Student's t distribution (the prediction interval of simple
    linear regression). The race is over when the chances of all the others to beat the worst of the `keep` best add
    up to no more than `risk`: by Boole's inequality so is then the chance that any of them would have.
    """

    rung: float = 0.8  # share of the decoder's steps
    risk: float = 0.05
    wave: int = 4  # candidates finished at once; four at least are there before the line is trusted

    name = "racing"

    def __post_init__(self) -> None:
        check_share(self.name, "rung", self.rung)
        check_share(self.name, "risk", self.risk)
        if self.wave < 1:
            raise ValueError(f"search '{self.name}': wave {self.wave!r} is out of range; give 1 or more")

    def check(self, asked: SearchContext) -> None:
        """Some have to be given up."""
        check_chooses(self.name, asked)

    def __call__(self, field: Field) -> Moves:
        """All to the rung, then wave after wave to the end."""
        step, here = steps_of(self.rung, field.num_steps), list(field.candidates)
        if step >= field.num_steps or len(here) <= field.keep:
            yield Go(here)
            return
        yield Go(here, until=step)
        looks = previewed(field, here)
        order = best(looks, len(here))
        number = max(self.wave, field.keep, LINE)
        while order:
            yield Go(order[:number])
            order, number = order[number:], self.wave
            scores = field.scores
            done = list(scores)
            bound = sorted(scores.values(), reverse=True)[min(field.keep, len(done)) - 1]
            chances = overtaking([looks[i] for i in done], [scores[i] for i in done], [looks[i] for i in order], bound)
            if sum(chances) <= self.risk:
                break
        field.drop(order)


@dataclass(frozen=True)
class FeynmanKac:
    """Feynman-Kac steering (Singhal et al. 2025, Algorithm 1): promising pictures are copied in place of others.

    A particle filter whose potentials are the differences of the previews' scores, times `strength`, so that pictures
    are drawn in proportion to exp(strength * score). Where the effective number falls below half of the candidates,
    they are resampled (systematic, Douc & Cappe 2005), and whoever has copies also stays where it is. A copy goes on
    by the noise of the seed whose place it takes, so the sampler has to add noise.
    """

    rungs: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)  # shares of the decoder's steps
    strength: float | None = None  # None: 1 / CLIP's temperature, which makes exp(...) its own likelihood

    name = "feynman_kac"

    def __post_init__(self) -> None:
        for rung in self.rungs:
            check_share(self.name, "rung", rung)

    def check(self, asked: SearchContext) -> None:
        """Copies have to come apart."""
        if not asked.is_noisy:
            raise ValueError(
                f"search '{self.name}' copies pictures that fresh noise then tells apart, but the sampler adds none; "
                "give eta above 0, or a sampler such as ddpm"
            )

    def __call__(self, field: Field) -> Moves:
        """From rung to rung, and all that are left to the end."""
        here = list(field.candidates)
        strength = field.sharpness if self.strength is None else self.strength
        weights, before = torch.zeros(len(here), dtype=torch.float64), torch.zeros(len(here), dtype=torch.float64)
        rng = torch.Generator("cpu").manual_seed((field.seed + RESAMPLING) % 2**32)
        for step in sorted({steps_of(rung, field.num_steps) for rung in self.rungs}):
            if step >= field.num_steps:
                break
            yield Go(here, until=step)
            scores = torch.tensor(field.previews(here), dtype=torch.float64)
            weights, before = weights + strength * (scores - before), scores
            shares = weights.softmax(0)
            if 1 / shares.square().sum() < len(here) / 2:
                origins = resampled(shares, float(torch.rand((), generator=rng, dtype=torch.float64)))
                for source in sorted(set(origins)):
                    copies = [here[slot] for slot, origin in enumerate(origins) if origin == source != slot]
                    if copies:
                        field.branch(here[source], copies)
                weights, before = torch.zeros_like(weights), before[origins]
        yield Go(here)


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search (Ma et al. 2025, section 3.1): a round's pictures begin near the best one's noise so far.

    The first round is drawn as ever. In every other one a candidate begins with sqrt(1 - share^2) of that noise and
    `share` of its own, which is unit noise again. The prior and the noise of the image embedding stay the best one's.
    """

    rounds: int = 4
    share: float = 0.5

    name = "zero_order"

    def __post_init__(self) -> None:
        check_share(self.name, "share", self.share)
        if self.rounds < 1:
            raise ValueError(f"search '{self.name}': rounds {self.rounds!r} is out of range; give 1 or more")

    def check(self, asked: SearchContext) -> None:
        """The noise has to be its own."""
        if asked.has_latents:
            raise ValueError(f"search '{self.name}' draws its own noise; leave latents out")

    def __call__(self, field: Field) -> Moves:
        """Round after round; all are painted."""
        rest = list(field.candidates)
        size = ceil(len(rest) / self.rounds)
        while rest:
            here, rest = rest[:size], rest[size:]
            if scores := field.scores:
                field.turn(best(scores, 1)[0], here, self.share)
            yield Go(here)


def resampled(shares: Tensor, u: float) -> list[int]:
    """Systematic resampling of shares (N,) by one number u of [0, 1): whom each of N slots goes on as.

    Each has the whole part of N times its share at least and one more at most. Whoever has any keeps its own slot; its
    further copies fill the slots of those who have none, from the first on.
    """
    number = len(shares)
    edges = (shares.cumsum(0) / shares.sum() * number - u).ceil().long().clamp(0, number)
    edges[-1] = number
    counts = torch.diff(edges, prepend=edges.new_zeros(1)).tolist()
    further = iter([index for index, count in enumerate(counts) for _ in range(count - 1)])
    return [index if count else next(further) for index, count in enumerate(counts)]


def overtaking(looks: Sequence[float], scores: Sequence[float], others: Sequence[float], bound: float) -> list[float]:
    """How likely each of `others`, given by its preview score, would have a final score above `bound`.

    By simple linear regression of `scores` on `looks`. 1 where there are too few to say, or all looks are the same.
    """
    number = len(looks)
    middle, mean = sum(looks) / max(number, 1), sum(scores) / max(number, 1)
    spread = sum((x - middle) ** 2 for x in looks)
    if number < LINE or spread == 0:
        return [1.0] * len(others)
    slope = sum((x - middle) * (y - mean) for x, y in zip(looks, scores, strict=True)) / spread
    off = sum((y - mean - slope * (x - middle)) ** 2 for x, y in zip(looks, scores, strict=True))
    chances = []
    for x in others:
        error = sqrt(off / (number - 2) * (1 + 1 / number + (x - middle) ** 2 / spread))
        ahead = bound - mean - slope * (x - middle)
        chances.append(float(stdtr(number - 2, -ahead / error)) if error > 0 else float(ahead < 0))
    return chances


def in_rounds(search: Search, field: Field) -> Moves:
    """A search in rounds until no further one fits the budget; the first is of one candidate, so that there is one.

    What a candidate takes is measured on the round before, previews, decoding and scores included, and a share of the
    time is left for what may go slower. Rounds grow step by step, for a round is lost where the time ends within it.
    """
    rest, size = list(field.candidates), 1
    while size > 0 and rest:
        here, rest = rest[:size], rest[size:]
        before = field.seconds_left()
        yield from search(field.among(here))
        left = field.seconds_left()
        each = (before - left) / len(here)
        most = min(max(ROUND, field.keep), GROWTH * size)
        size = min(most, int(PLANNED * left / each)) if each > 0 else most


_ALL: tuple[Search, ...] = (BestOf(), Halving(), Draft(), Racing(), FeynmanKac(), ZeroOrder())
SEARCHES: dict[str, Search] = {search.name: search for search in _ALL}


def by_name(search: str | Search) -> Search:
    """The search of this name as it comes, or one that was made; ValueError for an unknown name, or what is none."""
    if not isinstance(search, str):
        is_made = callable(search) and hasattr(search, "check") and hasattr(search, "name")
        if isinstance(search, type) or not is_made:
            kind = search.__name__ if isinstance(search, type) else type(search).__name__
            known = ", ".join(sorted(SEARCHES))
            raise ValueError(f"search is {kind}, which is none that was made; give one, or a name: {known}")
        return search
    if search not in SEARCHES:
        raise ValueError(f"search '{search}' is unknown; choose from: {', '.join(sorted(SEARCHES))}")
    return SEARCHES[search]
