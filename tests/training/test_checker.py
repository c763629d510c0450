"""The checker against pictures whose truth is known, as drawn and as an autoencoder might blur them."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from training.data.checker import SPECK, faults, read, right
from training.data.shapes import (
    BACKGROUNDS,
    PALETTE,
    RELATIONS,
    SHAPES,
    Claim,
    Noun,
    Scene,
    Thing,
    contrast,
    render,
    scene,
)

SCENES = 400


@cache
def true_pictures() -> list[tuple[Scene, NDArray[np.uint8]]]:
    return [(origin, render(origin)) for origin in map(scene, range(SCENES))]


def spoiled(picture: NDArray[np.uint8], blur: float, noise: float, seed: int = 0) -> NDArray[np.uint8]:
    """The picture after a Gaussian blur (pixels) and Gaussian noise (8-bit levels)."""
    pixels = picture.astype(np.float64)
    if blur:
        weights = np.exp(-0.5 * (np.arange(-4, 5) / blur) ** 2)
        weights /= weights.sum()
        for axis in (0, 1):
            wide = np.pad(pixels, [(4, 4) if axis == each else (0, 0) for each in range(3)], mode="edge")
            pixels = sum(
                weight * np.take(wide, np.arange(i, i + picture.shape[axis]), axis=axis)
                for i, weight in enumerate(weights)
            )
    pixels = pixels + noise * np.random.default_rng(seed).normal(size=pixels.shape)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def drawn(*things: tuple[str, str, float, float, float], background: str = "white") -> NDArray[np.uint8]:
    """Things given as colour, shape, x, y, radius."""
    nouns = [Thing(Noun(colour, shape, "small"), x, y, radius) for colour, shape, x, y, radius in things]
    return render(Scene(Claim(Noun("red", "circle", "small"), background=background), tuple(nouns)))


@pytest.mark.parametrize(("blur", "noise"), [(0, 0), (0.7, 6), (1.3, 4), (0, 16)])
@pytest.mark.parametrize("kind", ["one", "relation", "count"])
def test_true_pictures_are_read_right(kind: str, blur: float, noise: float) -> None:
    chosen = [(origin, picture) for origin, picture in true_pictures() if origin.claim.kind == kind]
    read_right = [right(read(spoiled(picture, blur, noise)), origin.claim) for origin, picture in chosen]
    assert len(chosen) >= SCENES / 6
    assert np.mean(read_right) >= 0.98


def test_a_claim_that_differs_in_one_fact_is_rejected() -> None:
    for seed, (origin, picture) in enumerate(true_pictures()):
        reading = read(picture)
        assert not right(reading, contrast(origin, seed).claim), (seed, origin.claim.text())


def test_what_a_caption_leaves_out_is_not_compared() -> None:
    for seed in range(100):
        claim = scene(seed).claim
        bare = replace(
            claim,
            first=replace(claim.first, size=None),
            second=claim.second and replace(claim.second, size=None),
            background=None,
        )
        assert bare.text() != claim.text()
        assert right(read(render(scene(seed))), bare), (seed, claim.text())


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", PALETTE)
def test_every_noun_on_every_background(colour: str, shape: str, background: str) -> None:
    for radius, size in ((7, "small"), (9, "small"), (12, "large"), (14, "large")):
        reading = read(spoiled(drawn((colour, shape, 30.25, 33.5, radius), background=background), 0.7, 4))
        assert reading.background == background
        (thing,) = reading.things
        assert (thing.colour, thing.shape, thing.size) == (colour, shape, size)
        assert abs(thing.radius - radius) <= 1


def test_the_centroid_is_the_centre_of_mass() -> None:
    for shape in ("circle", "square", "cross", "triangle"):
        (thing,) = read(drawn(("blue", shape, 20.25, 41.75, 9))).things
        assert thing.x == pytest.approx(20.25, abs=0.2) and thing.y == pytest.approx(41.75, abs=0.2)


SMALL_RED, LARGE_BLUE = Noun("red", "circle", "small"), Noun("blue", "square", "large")
PAIR = Claim(SMALL_RED, 1, "above", LARGE_BLUE, "white")
RED, BLUE = ("red", "circle", 32, 13, 8), ("blue", "square", 36, 45, 13)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (drawn(RED, BLUE), ()),
        (drawn(BLUE, RED), ()),
        (drawn(RED, BLUE, background="gray"), ("background",)),
        (drawn(RED), ("count", "relation")),
        (drawn(), ("count", "relation")),
        (drawn(RED, BLUE, ("green", "star", 10, 40, 8)), ("extra",)),
        (drawn(("orange", *RED[1:]), BLUE), ("colour",)),
        (drawn((RED[0], "heart", *RED[2:]), BLUE), ("shape",)),
        (drawn((*RED[:4], 12), ("blue", "square", 36, 48, 13)), ("size",)),
        (drawn(("red", "circle", 12, 32, 8), ("blue", "square", 45, 32, 13)), ("relation",)),
        (drawn(("red", "circle", 34, 54, 8), ("blue", "square", 34, 25, 13)), ("relation",)),
    ],
)
def test_the_wrong_fact_is_named(picture: NDArray[np.uint8], expected: tuple[str, ...]) -> None:
    reading = read(picture)
    assert faults(reading, PAIR) == expected
    assert right(reading, PAIR) == (not expected)


def test_too_many_of_a_counted_kind_is_a_wrong_count() -> None:
    stars = [("green", "star", x, y, 8) for x, y in ((12, 12), (40, 12), (12, 40))]
    reading = read(drawn(*stars))
    claims = {count: Claim(Noun("green", "star"), count) for count in (2, 3, 4)}
    assert [faults(reading, claims[count]) for count in (2, 3, 4)] == [("count",), (), ("count",)]
    assert faults(reading, Claim(Noun("green", "star"))) == ("extra",)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_four_relations_exclude_each_other(relation: str) -> None:
    step_x, step_y = RELATIONS[relation]
    picture = drawn(
        ("red", "circle", 32 + 14 * step_x, 32 + 14 * step_y, 8),
        ("red", "star", 32 - 14 * step_x, 32 - 14 * step_y, 8),
    )
    claims = {name: Claim(Noun("red", "circle"), 1, name, Noun("red", "star")) for name in RELATIONS}
    assert [name for name, claim in claims.items() if right(read(picture), claim)] == [relation]


def test_a_diagonal_is_no_relation() -> None:
    """Neither axis dominates."""
    reading = read(drawn(("red", "circle", 16, 16, 8), ("blue", "circle", 45, 45, 8)))
    for relation in RELATIONS:
        claim = Claim(Noun("red", "circle"), 1, relation, Noun("blue", "circle"))
        assert "relation" in faults(reading, claim)


def test_a_speck_is_no_object_and_a_blob_is() -> None:
    claim = Claim(Noun("blue", "square", "large"))
    picture = drawn(("blue", "square", 40, 40, 13))
    picture[5:8, 5:8] = PALETTE["red"]
    assert SPECK > 9 and right(read(picture), claim)
    picture[5:9, 5:9] = PALETTE["red"]
    assert faults(read(picture), claim) == ("extra",)


def test_what_has_no_shape_is_no_shape() -> None:
    claim = Claim(Noun("blue", "circle"))
    half = drawn(("blue", "circle", 32, 32, 13))
    half[32:] = BACKGROUNDS["white"]
    ring = drawn(("blue", "circle", 32, 32, 13))
    ring[26:38, 26:38] = BACKGROUNDS["white"]
    assert faults(read(half), claim) == ("shape",)
    assert faults(read(ring), claim) == ("shape",)


def test_touching_things_of_two_colours_are_two_things() -> None:
    picture = drawn(("red", "square", 20, 32, 9), ("blue", "square", 20 + 2 * 0.85 * 9, 32, 9))
    assert right(read(picture), Claim(Noun("red", "square"), 1, "left of", Noun("blue", "square")))


def test_a_thing_in_a_background_colour_is_none_of_the_palette() -> None:
    picture = drawn(("red", "circle", 32, 32, 13))
    picture[(picture == PALETTE["red"]).all(axis=2)] = BACKGROUNDS["gray"]
    assert [thing.colour for thing in read(picture).things] == ["gray"]


def test_any_picture_can_be_read() -> None:
    """Nonsense gives a reading too, and no claim is true of it."""
    rng = np.random.default_rng(0)
    for cell in (1, 2, 4, 8, 16) * 4:
        cells = rng.integers(0, 256, (64 // cell, 64 // cell, 3))
        picture = np.kron(cells, np.ones((cell, cell, 1))).astype(np.uint8)
        assert not right(read(picture), Claim(Noun("red", "circle")))
    assert read(np.zeros((64, 64, 3), np.uint8)).things == ()


def test_other_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="give uint8 of shape"):
        read(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        read(np.zeros((64, 64, 3), np.float32))  # type: ignore[arg-type]
