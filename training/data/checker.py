"""The checker: reads a painted Shapes picture without any network and says whether a claim is true of it.

Owns how colour, shape, size, place and number are read off pixels, and what makes a picture right. It takes
the palette and the outlines from `shapes.py` and never sees what a picture was meant to show: `read` gets
pixels alone, and `faults` compares what was read with a claim. Meant for pictures that an autoencoder made:
edges may be soft and pixels noisy. Knows nothing of models, files or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from training.data.shapes import BACKGROUNDS, PALETTE, RELATIONS, RESOLUTION, SHAPES, Claim, Noun, shape_mask

SPECK = 10  # pixels; anything smaller is not an object (the smallest true one, a star of radius 7, has 60)
FIT = 0.93  # overlap with the best template below which a thing has no shape (a circle and a square: 0.95)
LARGE_FROM = 10.5  # radius in pixels: half way between the largest small and the smallest large object
APART = 8.0  # pixels between two centroids, without which no relation holds
FACTS = ("background", "count", "extra", "colour", "shape", "size", "relation")

_FAR = 64.0  # RGB distance beyond which a border is none of the three backgrounds (they lie 195 apart)
_SECOND = 0.2  # share of a component's inside from which another colour is another thing
_BESIDE = 40.0  # RGB distance from a component's own line of colours beyond which a pixel is of another colour
_ENTRY_NAMES = (*PALETTE, *BACKGROUNDS)
_ENTRIES = np.array([*PALETTE.values(), *BACKGROUNDS.values()], dtype=np.float32)
_PALETTE_RGB = np.array(list(PALETTE.values()), dtype=np.float32)
_SOFTNESS = (0.0, 1.0)  # of the templates' edges: standard deviation of a blur in pixels
_RADII = np.arange(5.0, 16.5, 0.5)  # of the templates, pixels
_REACH = 20  # templates are 40x40, centred within half a pixel of the middle

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """One thing found in a picture.

    `colour` is a palette entry, or a background's name where that is nearest; `shape` and `size` are None
    where no shape fits. `x`, `y` are the centroid, pixels from the left and the top edge; `radius` is that of
    the best template's enclosing circle; `fit` its overlap, 0 to 1.
    """

    colour: str
    shape: str | None
    size: str | None
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `background` is None where the border is none of the three."""

    background: str | None
    things: tuple[Seen, ...]


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read one picture, (64, 64, 3) uint8 RGB.

    The background is the border's nearest entry; every other pixel is taken for a mixture of background and
    one colour, and connected pixels that are at least half colour make a thing.
    """
    if picture.shape != (RESOLUTION, RESOLUTION, 3) or picture.dtype != np.uint8:
        given = f"{picture.dtype} picture of shape {picture.shape}"
        raise ValueError(f"cannot read a {given}; give uint8 of shape ({RESOLUTION}, {RESOLUTION}, 3)")
    pixels = picture.astype(np.float32)
    background, ground = _background(pixels)
    coverage = _coverage(pixels, ground)
    solid = coverage >= 0.5
    parts = [part for piece in _components(solid) for part in _one_colour_each(pixels, ground, piece)]
    return Reading(background, tuple(_see(pixels, ground, part, solid & ~part) for part in parts))


def right(reading: Reading, claim: Claim) -> bool:
    """Whether the picture shows what the claim says and nothing else."""
    return not faults(reading, claim)


def faults(reading: Reading, claim: Claim) -> tuple[str, ...]:
    """The facts, of `FACTS`, that keep the claim from being true; empty where the picture is right.

    Things are taken for the claim's objects in the way that leaves the fewest facts wrong. `count`: objects
    are missing, or there are too many where the claim counts; `extra`: there is something besides the one or
    two objects named. Sizes and a background that the claim leaves open are not compared.
    """
    wrong = set()
    if claim.background is not None and reading.background != claim.background:
        wrong.add("background")
    nouns = claim.nouns() if claim.second is not None else (claim.first,) * claim.count
    if len(reading.things) < len(nouns):
        wrong.add("count")
    elif len(reading.things) > len(nouns):
        wrong.add("count" if claim.count > 1 else "extra")
    wrong |= _object_faults(reading.things, nouns, claim)
    return tuple(fact for fact in FACTS if fact in wrong)


def _object_faults(things: Sequence[Seen], nouns: Sequence[Noun], claim: Claim) -> set[str]:
    """The fewest wrong facts over the ways to take things for the claim's objects."""
    if claim.second is None:  # all the same: the things that agree best
        each = sorted((_noun_faults(thing, claim.first) for thing in things), key=len)
        return set[str]().union(*each[: len(nouns)])
    if len(things) < 2:
        each = sorted((_noun_faults(thing, noun) for thing in things for noun in nouns), key=len)
        return {"relation"} | set[str]().union(*each[:1])
    best = (np.inf, set[str]())
    for first, second in permutations(things, 2):
        found = [*_noun_faults(first, nouns[0]), *_noun_faults(second, nouns[1])]
        if not _holds(claim.relation, first, second):
            found.append("relation")
        best = min(best, (len(found), set(found)), key=lambda pair: pair[0])
    return best[1]


def _noun_faults(thing: Seen, noun: Noun) -> list[str]:
    wrong = [fact for fact in ("colour", "shape") if getattr(thing, fact) != getattr(noun, fact)]
    return [*wrong, "size"] if noun.size is not None and thing.size != noun.size else wrong


def _holds(relation: str | None, first: Seen, second: Seen) -> bool:
    """Its axis dominates and the centroids are `APART` or more."""
    if relation is None:
        return True
    step_x, step_y = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = dx * step_x + dy * step_y, dx * step_y + dy * step_x
    return along > abs(across) and bool(np.hypot(dx, dy) >= APART)


def _background(pixels: Floats) -> tuple[str | None, Floats]:
    """Name and measured colour (3,) of the border, two pixels wide, which no object touches."""
    border = np.concatenate((pixels[:2], pixels[-2:], pixels[2:-2, :2], pixels[2:-2, -2:]), axis=None)
    ground = np.median(border.reshape(-1, 3), axis=0).astype(np.float32)
    distances = {name: float(np.linalg.norm(ground - rgb)) for name, rgb in BACKGROUNDS.items()}
    name = min(distances, key=lambda key: distances[key])
    return (name if distances[name] <= _FAR else None), ground


def _coverage(pixels: Floats, ground: Floats) -> Floats:
    """How far each pixel lies, 0 to 1, along the nearest of the lines from background to palette: (64, 64).

    A half-covered edge is thus a half, whatever entry its blended colour happens to lie near.
    """
    lines = _PALETTE_RGB - ground  # (8, 3)
    offsets = pixels - ground  # (64, 64, 3)
    lengths = (lines**2).sum(axis=1)
    shares = np.clip(offsets @ lines.T / lengths, 0, 1)  # (64, 64, 8)
    residual = shares**2 * lengths - 2 * shares * (offsets @ lines.T)  # squared distance, but for a constant
    best = residual.argmin(axis=2)[..., None]
    return np.take_along_axis(shares, best, axis=2)[..., 0]


def _components(mask: Mask) -> list[Mask]:
    """Side-connected pieces of at least `SPECK` pixels, top to bottom: rows' runs joined by union-find."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    rows, edges = np.nonzero(np.diff(padded, axis=1))  # a run begins and ends in turn
    runs = list(zip(rows[::2].tolist(), edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for index, (row, begin, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= begin):
            above += 1
        other = above
        while runs[other][0] == row - 1 and runs[other][1] < end:
            low, high = sorted((root(other), root(index)))
            parent[high] = low
            other += 1
    pieces: dict[int, Mask] = {}
    for index, (row, begin, end) in enumerate(runs):
        piece = pieces.setdefault(root(index), np.zeros_like(mask))
        piece[row, begin:end] = True
    return [piece for piece in pieces.values() if piece.sum() >= SPECK]


def _one_colour_each(pixels: Floats, ground: Floats, component: Mask) -> list[Mask]:
    """The component, or its pieces where things of several colours touch.

    What lies between the background and the component's own colour is a soft edge and no colour of its own.
    """
    inside = pixels[_inside(component)]  # (pixels, 3)
    names = _nearest_entry(inside)
    main = int(np.bincount(names).argmax())
    line = _ENTRIES[main] - ground
    shares = np.clip((inside - ground) @ line / max(float(line @ line), 1.0), 0, 1)
    beside = np.linalg.norm(inside - ground - shares[:, None] * line, axis=1) > _BESIDE
    others = np.bincount(names[beside], minlength=len(_ENTRIES)) >= max(SPECK, _SECOND * len(names))
    others[main] = False
    if not others.any():
        return [component]
    present = [main, *np.flatnonzero(others).tolist()]
    nearest = _nearest_entry(pixels, _ENTRIES[present])
    return [piece for index in range(len(present)) for piece in _components(component & (nearest == index))]


def _nearest_entry(pixels: Floats, entries: Floats | None = None) -> NDArray[np.int64]:
    """Index of the nearest of `entries` (None: palette, then backgrounds) to every pixel of (..., 3)."""
    entries = _ENTRIES if entries is None else entries
    return ((pixels[..., None, :] - entries) ** 2).sum(axis=-1).argmin(axis=-1)


def _see(pixels: Floats, ground: Floats, part: Mask, others: Mask) -> Seen:
    """Colour from the part's inside; shape and place from all it covers, faint tips and soft edges included."""
    colour = np.median(pixels[_inside(part)], axis=0).astype(np.float32)
    name = _ENTRY_NAMES[int(_nearest_entry(colour))]
    line = colour - ground
    cover = np.clip((pixels - ground) @ line / max(float(line @ line), 1.0), 0, 1).astype(np.float32)
    cover *= _grown(_grown(_grown(part))) & ~_grown(others)
    middles = np.arange(RESOLUTION, dtype=np.float32) + 0.5
    mass = max(float(cover.sum()), 1.0)
    x, y = float(cover.sum(axis=0) @ middles / mass), float(cover.sum(axis=1) @ middles / mass)
    shape, radius, fit = _fit(cover, x, y)
    if fit < FIT:
        return Seen(name, None, None, x, y, radius, fit)
    return Seen(name, shape, "large" if radius >= LARGE_FROM else "small", x, y, radius, fit)


def _fit(cover: Floats, x: float, y: float) -> tuple[str, float, float]:
    """The best shape, its radius and its overlap 2 <c, t> / (<c, c> + <t, t>), the soft Dice coefficient.

    Area and centroid give each shape's radius and centre; the search goes one pixel of radius and half a
    pixel of place around them.
    """
    norm = float((cover**2).sum())
    area = float(cover.sum())
    padded = np.pad(cover, _REACH + 2)
    best = ("", 0.0, -1.0)
    for shape in SHAPES:
        templates = _templates(shape)
        at = int(np.abs(templates.areas - area).argmin())
        radii = slice(max(0, at - 2), at + 3)
        centre = np.array([y, x]) - templates.offset * _RADII[at]
        for half_y, half_x in np.round(centre * 2).astype(int) + _NEIGHBOURS:
            window = padded[
                half_y // 2 + 2 : half_y // 2 + 2 + 2 * _REACH, half_x // 2 + 2 : half_x // 2 + 2 + 2 * _REACH
            ]
            if window.size != 4 * _REACH**2:  # a centre beyond the picture
                continue
            stack = templates.covers[half_y % 2, half_x % 2, radii]  # (radii, softness, 1600)
            overlaps = 2 * (stack @ window.ravel()) / (norm + templates.norms[half_y % 2, half_x % 2, radii])
            index = int(overlaps.argmax())
            if overlaps.flat[index] > best[2]:
                best = (shape, float(_RADII[radii][index // len(_SOFTNESS)]), float(overlaps.flat[index]))
    return best


_NEIGHBOURS = np.array([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])  # half pixels


@dataclass(frozen=True)
class _Templates:
    """One shape drawn at every radius of `_RADII`, at centres on half pixels, edges sharp and soft."""

    covers: Floats  # (2, 2, radii, softness, 1600); first the half pixels that the centre lies down and right
    norms: Floats  # (2, 2, radii, softness): squared lengths of the covers
    areas: Floats  # (radii,)
    offset: Floats  # (2,): centroid minus centre, down and right, in radii


@cache
def _templates(shape: str) -> _Templates:
    drawn = [
        [[_draw(shape, down, across, radius) for radius in _RADII.tolist()] for across in (0.0, 0.5)]
        for down in (0.0, 0.5)
    ]
    sharp = np.array(drawn, dtype=np.float32)  # (2, 2, radii, 40, 40)
    covers = np.stack([_blurred(sharp, deviation) for deviation in _SOFTNESS], axis=3)
    middles = np.arange(2 * _REACH) + 0.5 - _REACH
    largest = sharp[0, 0, -1]
    centroid = np.array([largest.sum(axis=1) @ middles, largest.sum(axis=0) @ middles]) / largest.sum()
    return _Templates(
        covers=covers.reshape(*covers.shape[:4], -1),
        norms=(covers**2).sum(axis=(4, 5)),
        areas=sharp[0, 0].sum(axis=(1, 2)),
        offset=(centroid / _RADII[-1]).astype(np.float32),
    )


def _draw(shape: str, down: float, across: float, radius: float) -> Floats:
    """Coverage (40, 40) of a shape whose centre lies this far from the middle."""
    middle = RESOLUTION // 2
    drawn = shape_mask(shape, middle + across, middle + down, radius)
    cells = drawn.reshape(RESOLUTION, drawn.shape[0] // RESOLUTION, RESOLUTION, -1).mean(axis=(1, 3))
    window = slice(middle - _REACH, middle + _REACH)
    return cells[window, window].astype(np.float32)


def _blurred(pictures: Floats, deviation: float) -> Floats:
    """Gaussian blur of the last two axes."""
    if deviation == 0:
        return pictures
    steps = np.arange(-3, 4)
    weights = np.exp(-0.5 * (steps / deviation) ** 2)
    for axis in (-2, -1):
        moved = [weight * np.roll(pictures, step, axis) for step, weight in zip(steps, weights, strict=True)]
        pictures = (sum(moved) / weights.sum()).astype(np.float32)
    return pictures


def _inside(mask: Mask) -> Mask:
    """The mask without its outermost pixels, or all of it where little would be left."""
    shrunk = mask & ~_grown(~mask)
    return shrunk if shrunk.sum() >= SPECK else mask


def _grown(mask: Mask) -> Mask:
    """The mask and its neighbours by a side."""
    wide = np.pad(mask, 1)
    return wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
