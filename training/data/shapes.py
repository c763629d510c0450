"""Shapes: a captioned data set whose every picture can be checked by a program.

Owns what a scene may hold, how it is drawn, what its caption may say, and which captions are kept for testing.
Scenes are drawn with integers only and chosen with `random.Random.random()` alone, so a seed gives the same
scene and the same pixels on any machine. Knows nothing of files (`folder.py`, `shards.py`) or of training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 64  # pixels on a side
OVERSAMPLING = 4  # drawn at 4x, area-averaged

BACKGROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
PALETTE = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 210, 40),
    "green": (40, 170, 60),
    "cyan": (40, 200, 210),
    "blue": (50, 80, 220),
    "purple": (150, 60, 180),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": (7, 9), "large": (12, 14)}  # radius of the enclosing circle, pixels, inclusive
RELATIONS = {  # unit step from the second object to the first; y grows downwards
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_PAIRS = frozenset({("purple", "star"), ("cyan", "heart"), ("orange", "cross"), ("pink", "triangle")})
HELD_OUT_SHARE = 6  # one claim in six, by its hash, is never said in training

WORDINGS = {  # the first is canonical
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "underneath"),
}
BACKGROUND_WORDINGS = ("on a {} background", "on {}", "against a {} background")

_GAP = 2  # pixels kept free between two objects and between an object and the border
_AXIS_LEAD = 6  # pixels by which a relation's axis leads the other, so no relation is a close call
_SUB = OVERSAMPLING
_SQUARE_SIDE = 0.85  # half the side of a square, of the radius
_UNIT = 1000  # shape outlines are integers in thousandths of the radius
_STAR = (  # outer radius 1, inner radius 0.42
    *((0, -1000), (247, -340), (951, -309), (399, 130), (588, 809)),
    *((0, 420), (-588, 809), (-399, 130), (-951, -309), (-247, -340)),
)
_TRIANGLE = ((0, -1000), (866, 500), (-866, 500))
_HEART_POINT = ((-840, -180), (840, -180), (0, 970))
_HEART_LOBES = ((-420, -330, 450), (420, -330, 450))  # x, y, radius

T = TypeVar("T")
Edit = Literal["any", "relation"]
"""Which fact `contrast` may change."""


@dataclass(frozen=True)
class Noun:
    """What a caption calls an object; `size` None where the caption leaves it out."""

    colour: str
    shape: str
    size: str | None = None

    def text(self) -> str:
        """The words, without an article."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Claim:
    """Everything a caption says about a picture: the unit of the train/test split and of the checker.

    Either one kind of object (`count` 1 to 4, no relation) or two objects in a relation (`count` 1). None for
    `background` or a noun's size means that the caption leaves it open.
    """

    first: Noun
    count: int = 1
    relation: str | None = None
    second: Noun | None = None
    background: str | None = None

    def text(self, rng: random.Random | None = None) -> str:
        """The caption: the canonical wording, or with `rng` one of the usual wordings."""

        def pick(wordings: Sequence[str]) -> str:
            return wordings[0] if rng is None else _choice(rng, wordings)

        if self.count > 1:
            words = [COUNT_WORDS[self.count], _plural(self.first.text())]
        else:
            words = ["a", self.first.text()]
        if self.relation is not None and self.second is not None:
            words += [pick(WORDINGS[self.relation]), "a", self.second.text()]
        words = [" ".join(words).replace("a orange", "an orange")]
        if self.background is not None:
            words.append(pick(BACKGROUND_WORDINGS).format(self.background))
        return " ".join(words)

    @property
    def kind(self) -> str:
        """`one`, `relation` or `count`."""
        return "relation" if self.relation else "count" if self.count > 1 else "one"

    def nouns(self) -> tuple[Noun, ...]:
        """The kinds of object named."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def to_json(self) -> dict[str, Any]:
        """The claim as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Claim:
        """What `to_json` gave, as a claim again."""
        second = fields.get("second")
        return cls(**{**fields, "first": Noun(**fields["first"]), "second": Noun(**second) if second else None})


@dataclass(frozen=True)
class Thing:
    """One object in a picture: its centre and the radius of its enclosing circle, in pixels."""

    noun: Noun
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `claim` is the whole truth about it, sizes and background included."""

    claim: Claim
    things: tuple[Thing, ...]


def held_out(claim: Claim) -> bool:
    """Whether the claim is kept for testing: by a hash of its canonical words, or by a held-out pair."""
    digest = hashlib.sha256(claim.text().encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0 or has_held_out_pair(claim)


def has_held_out_pair(claim: Claim) -> bool:
    """Whether the claim names a colour-shape pair that no training picture shows."""
    return any((noun.colour, noun.shape) in HELD_OUT_PAIRS for noun in claim.nouns())


def scene(seed: int) -> Scene:
    """A random training scene: 25 % one object, 55 % two in a relation, 20 % two to four of one kind."""
    rng = random.Random(seed)
    while True:
        claim = _random_claim(rng)
        if not held_out(claim):
            return place(claim, rng)


def contrast(origin: Scene, seed: int, kind: Edit = "any") -> Scene:
    """A training scene that differs from `origin` in one fact: a hard negative for contrastive training.

    The edits are those that contrastive models are known to miss (Yuksekgonul et al. 2023, "bags of words"):
    colours, shapes or sizes exchanged between two objects, the relation turned, one attribute or count changed.
    `kind` "relation" asks for the relation turned or the objects exchanged, where there are two of them.
    """
    rng = random.Random(seed)
    while True:
        claim = _edit(origin.claim, rng, kind)
        if claim != origin.claim and _sayable(claim) and not held_out(claim):
            return place(claim, rng)


def caption(origin: Scene, seed: int) -> str:
    """A training caption of the scene: sizes and background left out at times, any of the usual wordings."""
    rng = random.Random(seed)
    while True:
        claim = _leave_out(origin.claim, rng)
        if not held_out(claim):
            return claim.text(rng)


def full_claim(claim: Claim, rng: random.Random) -> Claim:
    """The claim with every size and background that it leaves open chosen at random."""
    first = replace(claim.first, size=claim.first.size or _size(rng, claim.count))
    second = claim.second and replace(claim.second, size=claim.second.size or _size(rng, 1))
    return replace(claim, first=first, second=second, background=claim.background or _choice(rng, tuple(BACKGROUNDS)))


def place(claim: Claim, rng: random.Random) -> Scene:
    """Put the claim's objects where they touch neither each other nor the border and the relation is clear.

    Sizes and background must be named; positions lie on quarter pixels.
    """
    if claim.second is not None:
        nouns = [claim.first, claim.second]
    else:
        nouns = [claim.first] * claim.count
    while True:
        things = tuple(_drop(noun, rng) for noun in nouns)
        if _apart(things) and _related(claim.relation, things):
            return Scene(claim, things)


def render(origin: Scene) -> NDArray[np.uint8]:
    """Draw the scene: (64, 64, 3) uint8 RGB, area-averaged from 256x256."""
    size = RESOLUTION * _SUB
    canvas = np.empty((size, size, 3), dtype=np.int64)
    canvas[:] = BACKGROUNDS[origin.claim.background or "white"]
    for thing in origin.things:
        canvas[shape_mask(thing.noun.shape, thing.x, thing.y, thing.radius)] = PALETTE[thing.noun.colour]
    cells = canvas.reshape(RESOLUTION, _SUB, RESOLUTION, _SUB, 3).sum(axis=(1, 3))
    return ((cells + _SUB * _SUB // 2) // (_SUB * _SUB)).astype(np.uint8)


def shape_mask(shape: str, x: float, y: float, radius: float) -> NDArray[np.bool_]:
    """The shape on the 256x256 drawing grid; centre and radius in pixels of the 64x64 picture.

    Integer arithmetic throughout: coordinates are half grid cells, outlines thousandths of the radius.
    """
    half = 2 * _SUB  # half grid cells a pixel
    centre_x, centre_y, reach = (round(value * half) for value in (x, y, radius))
    cells = 2 * np.arange(RESOLUTION * _SUB, dtype=np.int64) + 1
    dx = (cells - centre_x)[None, :] * _UNIT
    dy = (cells - centre_y)[:, None] * _UNIT
    if shape == "circle":
        return _disc(dx, dy, (0, 0, _UNIT), reach)
    if shape == "square":
        side = round(_SQUARE_SIDE * _UNIT) * reach
        return (np.abs(dx) <= side) & (np.abs(dy) <= side)
    if shape == "cross":
        narrow, long = 330 * reach, 940 * reach
        return ((np.abs(dx) <= narrow) & (np.abs(dy) <= long)) | ((np.abs(dx) <= long) & (np.abs(dy) <= narrow))
    if shape == "triangle":
        return _polygon(dx, dy, _TRIANGLE, reach)
    if shape == "star":
        return _polygon(dx, dy, _STAR, reach)
    if shape == "heart":
        lobes = [_disc(dx, dy, lobe, reach) for lobe in _HEART_LOBES]
        return lobes[0] | lobes[1] | _polygon(dx, dy, _HEART_POINT, reach)
    raise ValueError(f"shape {shape!r} is unknown; choose from: {', '.join(SHAPES)}")


def _choice(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]  # random.random is stable across Python versions


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("cross") else "s")


def _size(rng: random.Random, count: int) -> str:
    return "small" if count > 2 else _choice(rng, tuple(SIZES))


def _random_noun(rng: random.Random, count: int = 1) -> Noun:
    return Noun(_choice(rng, tuple(PALETTE)), _choice(rng, SHAPES), _size(rng, count))


def _random_claim(rng: random.Random) -> Claim:
    background = _choice(rng, tuple(BACKGROUNDS))
    draw = rng.random()
    if draw < 0.25:
        return Claim(_random_noun(rng), background=background)
    if draw < 0.45:
        count = 2 + int(rng.random() * 3)
        return Claim(_random_noun(rng, count), count, background=background)
    while True:
        relation = _choice(rng, tuple(RELATIONS))
        claim = Claim(_random_noun(rng), 1, relation, _random_noun(rng), background)
        if _sayable(claim):
            return claim


def _sayable(claim: Claim) -> bool:
    """Two objects must differ in colour or shape, and more than two must be small."""
    if claim.count > 2 and claim.first.size == "large":
        return False
    second = claim.second
    return second is None or (claim.first.colour, claim.first.shape) != (second.colour, second.shape)


def _edit(claim: Claim, rng: random.Random, kind: Edit) -> Claim:
    first, second = claim.first, claim.second
    draw = rng.random()
    if kind == "relation" and rng.random() < 0.95:  # not always: every turn of the relation may be held out
        draw *= 0.55
    if second is not None and draw < 0.80:
        if draw < 0.35:
            return replace(claim, relation=_choice(rng, tuple(RELATIONS)))
        if draw < 0.55:
            return replace(claim, first=second, second=first)
        field = _choice(rng, ("colour", "shape", "size"))
        mine, theirs = getattr(first, field), getattr(second, field)
        return replace(claim, first=replace(first, **{field: theirs}), second=replace(second, **{field: mine}))
    if second is None and claim.count > 1 and draw < 0.5:
        return replace(claim, count=2 + int(rng.random() * 3))
    if draw < 0.85 or second is None:
        fresh = _random_noun(rng, claim.count)
        field = _choice(rng, ("colour", "shape", "size"))
        return replace(claim, first=replace(first, **{field: getattr(fresh, field)}))
    return replace(claim, background=_choice(rng, tuple(BACKGROUNDS)))


def _leave_out(claim: Claim, rng: random.Random) -> Claim:
    first = claim.first if rng.random() < 0.7 else replace(claim.first, size=None)
    second = claim.second
    if second is not None and rng.random() >= 0.7:
        second = replace(second, size=None)
    return replace(claim, first=first, second=second, background=claim.background if rng.random() < 0.6 else None)


def _drop(noun: Noun, rng: random.Random) -> Thing:
    if noun.size is None:
        raise ValueError(f"cannot draw {noun.text()!r}: its size is not named; use full_claim first")
    low, high = SIZES[noun.size]
    radius = (low * _SUB + int(rng.random() * ((high - low) * _SUB + 1))) / _SUB
    room = RESOLUTION - 2 * (radius + _GAP)
    x, y = (radius + _GAP + int(rng.random() * (room * _SUB + 1)) / _SUB for _ in range(2))
    return Thing(noun, x, y, radius)


def _apart(things: Sequence[Thing]) -> bool:
    return all(_clear(a, b) for i, a in enumerate(things) for b in things[:i])


def _clear(a: Thing, b: Thing) -> bool:
    """Whether two objects keep the gap: by their circles, and by their sides where both are squares."""
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    if dx**2 + dy**2 < (a.radius + b.radius + _GAP) ** 2:
        return False
    if a.noun.shape == b.noun.shape == "square":  # corners reach beyond the circle
        return max(dx, dy) >= _SQUARE_SIDE * (a.radius + b.radius) + _GAP
    return True


def _related(relation: str | None, things: Sequence[Thing]) -> bool:
    if relation is None:
        return True
    step_x, step_y = RELATIONS[relation]
    dx, dy = things[0].x - things[1].x, things[0].y - things[1].y
    along = dx * step_x + dy * step_y
    across = abs(dy) if step_x else abs(dx)
    return along >= across + _AXIS_LEAD


def _disc(dx: NDArray[np.int64], dy: NDArray[np.int64], disc: tuple[int, int, int], reach: int) -> NDArray[np.bool_]:
    x, y, radius = (value * reach for value in disc)
    return (dx - x) ** 2 + (dy - y) ** 2 <= radius**2


def _polygon(
    dx: NDArray[np.int64], dy: NDArray[np.int64], outline: Sequence[tuple[int, int]], reach: int
) -> NDArray[np.bool_]:
    """Even-odd rule, exact in integers."""
    inside = np.zeros(np.broadcast_shapes(dx.shape, dy.shape), dtype=bool)
    previous_x, previous_y = (value * reach for value in outline[-1])
    for point in outline:
        x, y = (value * reach for value in point)
        crosses = (y > dy) != (previous_y > dy)
        side = (dx - x) * (previous_y - y) - (previous_x - x) * (dy - y)
        inside ^= crosses & ((side < 0) == (previous_y > y))
        previous_x, previous_y = x, y
    return inside
