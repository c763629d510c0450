"""Shapes: the same scene everywhere, drawn and told as promised, and nothing kept for testing ever shown or said."""

import hashlib
import random
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from training.data.shapes import (
    BACKGROUNDS,
    HELD_OUT_PAIRS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    WORDINGS,
    Claim,
    Noun,
    Scene,
    Thing,
    caption,
    contrast,
    full_claim,
    has_held_out_pair,
    held_out,
    place,
    render,
    scene,
    shape_mask,
)
from training.data.shapes_set import GROUP_SIZE, shapes
from training.data.suite import load

NUM_SCENES = 1000


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Fresh scenes, each followed by a contrast to it."""
    fresh = [scene(seed) for seed in range(NUM_SCENES)]
    return [each for seed, origin in enumerate(fresh) for each in (origin, contrast(origin, seed))]


GOLDEN = {  # seed: canonical words, caption, SHA-256 of the pixels
    0: (
        "a small yellow star right of a small purple square on a gray background",
        "a small yellow star on the right of a small purple square on a gray background",
        "2e858831537ce312",
    ),
    1: (
        "a small yellow triangle below a small blue heart on a white background",
        "a small yellow triangle under a small blue heart against a white background",
        "60b1fd087885642b",
    ),
    2: (
        "a large red cross left of a large blue square on a gray background",
        "a red cross left of a blue square against a gray background",
        "b781bb7f4cc17634",
    ),
    10: (
        "three small orange hearts on a black background",
        "three small orange hearts on black",
        "42e3ef4279e14a1e",
    ),
    4_000_000_000: (
        "a large red square on a gray background",
        "a large red square against a gray background",
        "35fbf65db954c3fb",
    ),
}


@pytest.mark.parametrize("seed", GOLDEN)
def test_a_seed_gives_the_same_words_and_pixels_on_any_machine(seed: int) -> None:
    words, wording, pixels = GOLDEN[seed]
    drawn = scene(seed)
    assert drawn.claim.text() == words
    assert caption(drawn, seed) == wording
    assert hashlib.sha256(render(drawn).tobytes()).hexdigest()[:16] == pixels


def test_the_data_set_is_the_same_on_any_machine() -> None:
    digest = hashlib.sha256()
    for pixels, text, group in shapes(200, 0):
        for part in (pixels.tobytes(), text.encode(), group.encode()):
            digest.update(part)
    assert digest.hexdigest() == "b6d377dba910dad46c06a56cf40461cee3d147fcb2508ef50b6210d0283a4955"


def test_a_picture_does_not_depend_on_the_size_of_the_set() -> None:
    few, many = list(shapes(5, seed=7)), list(shapes(11, seed=7))
    for one, other in zip(few, many, strict=False):
        assert np.array_equal(one[0], other[0]) and one[1:] == other[1:]
    assert any(not np.array_equal(one[0], other[0]) for one, other in zip(few, shapes(5, seed=8), strict=True))


def test_a_group_is_a_scene_and_three_that_differ_in_one_fact() -> None:
    groups = [group for _, _, group in shapes(12)]
    assert groups == [f"{number:06d}" for number in range(3) for _ in range(GROUP_SIZE)]
    for seed in range(200):
        origin = scene(seed)
        other = contrast(origin, seed + 1)
        assert other.claim != origin.claim
        assert other.claim.kind == origin.claim.kind
        claim, changed = origin.claim.to_json(), other.claim.to_json()
        differing = {key for key in claim if claim[key] != changed[key]}
        # an exchange between the two objects touches both of them; everything else touches one fact
        assert len(differing) == 1 or differing == {"first", "second"}, (origin.claim, other.claim)


def test_nothing_touches(scenes: list[Scene]) -> None:
    for drawn in scenes:
        for thing in drawn.things:
            for at in (thing.x, thing.y):
                assert thing.radius + 1 <= at <= 63 - thing.radius
        for a, b in combinations(drawn.things, 2):
            assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2


def test_pixels_of_two_objects_never_meet(scenes: list[Scene]) -> None:
    for drawn in scenes[:200]:
        masks = [shape_mask(thing.noun.shape, thing.x, thing.y, thing.radius) for thing in drawn.things]
        assert (sum(mask.astype(int) for mask in masks) <= 1).all()
        everything = np.any(masks, axis=0)
        assert not (everything[0].any() or everything[-1].any() or everything[:, 0].any() or everything[:, -1].any())


def test_relations_hold(scenes: list[Scene]) -> None:
    seen = set()
    for drawn in scenes:
        relation = drawn.claim.relation
        if relation is None:
            continue
        seen.add(relation)
        first, second = drawn.things
        dx, dy = first.x - second.x, first.y - second.y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        across = abs(dy) if relation in ("left of", "right of") else abs(dx)
        assert along >= 8 and along > across  # as the checker asks
    assert seen == set(RELATIONS)


def test_scenes_are_what_they_claim(scenes: list[Scene]) -> None:
    shares = dict.fromkeys(("one", "relation", "count"), 0)
    for drawn in scenes:
        claim = drawn.claim
        shares[claim.kind] += 1
        nouns = [claim.first] * claim.count if claim.second is None else [claim.first, claim.second]
        assert [thing.noun for thing in drawn.things] == nouns
        assert claim.background in BACKGROUNDS
        for thing in drawn.things:
            assert thing.noun.colour in PALETTE and thing.noun.shape in SHAPES
            low, high = SIZES[str(thing.noun.size)]
            assert low <= thing.radius <= high
        assert claim.count <= 2 or claim.first.size == "small"
        if claim.second is not None:
            assert (claim.first.colour, claim.first.shape) != (claim.second.colour, claim.second.shape)
    assert shares["one"] / len(scenes) == pytest.approx(0.25, abs=0.05)
    assert shares["relation"] / len(scenes) == pytest.approx(0.55, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_keeps_to_its_circle_and_a_square_to_its_half_side(shape: str) -> None:
    mask = shape_mask(shape, 32, 32, 12)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    centres = (np.arange(256) + 0.5) / 4 - 32  # of the drawing grid's cells, in pixels
    if shape == "square":
        assert rows[-1] - rows[0] + 1 == pytest.approx(2 * 0.85 * 12 * 4, abs=1)
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    else:
        distance = np.hypot(centres[:, None], centres[None, :])
        assert distance[mask].max() <= 12 * 1.001
        assert distance[mask].max() > 12 * 0.93
    assert np.array_equal(mask, mask[:, ::-1])  # every shape is its own mirror image


def test_colours_are_the_palette_and_edges_the_area_average() -> None:
    noun = Noun("purple", "square", "large")
    pixels = render(Scene(Claim(noun, background="black"), (Thing(noun, 32.0, 32.0, 14.0),)))
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[32, 32]) == (150, 60, 180) and tuple(pixels[0, 0]) == (15, 15, 15)
    # half side 0.85 * 14 = 11.9: the column at 20 is covered from 20.1 on, which is four of its four quarter cells
    # short of the first, whose centre 20.125 still counts
    assert tuple(pixels[32, 20]) == (150, 60, 180)
    # half side 0.85 * 13.5 = 11.475: column 20 is covered from 20.525 on, two quarter cells of four
    half = render(Scene(Claim(noun, background="black"), (Thing(noun, 32.0, 32.0, 13.5),)))[32, 20].astype(int)
    assert np.abs(half - (np.array([150, 60, 180]) + 15) / 2).max() <= 1


def test_what_is_kept_for_testing_is_never_shown_or_said(scenes: list[Scene]) -> None:
    pairs = [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for seed, drawn in enumerate(scenes):
        assert not held_out(drawn.claim)
        assert all((thing.noun.colour, thing.noun.shape) not in HELD_OUT_PAIRS for thing in drawn.things)
        for words in (caption(drawn, seed), caption(drawn, seed + NUM_SCENES * 2)):
            assert not any(pair in words for pair in pairs), words
            assert not held_out(read(words)), words


def test_the_committed_test_prompts_are_never_a_training_caption(scenes: list[Scene]) -> None:
    prompts = {prompt.text for prompt in load()}
    assert len(prompts) >= 210
    captions = {canonical(caption(drawn, seed)) for seed, drawn in enumerate(scenes)}
    assert len(captions) > 1000
    assert not prompts & captions


def test_a_sixth_of_what_can_be_said_is_held_out() -> None:
    claims = [
        Claim(Noun(colour, shape, size), background=background)
        for colour in PALETTE
        for shape in SHAPES
        for size in (None, *SIZES)
        for background in (None, *BACKGROUNDS)
    ]
    free = [claim for claim in claims if not has_held_out_pair(claim)]
    assert sum(map(held_out, free)) / len(free) == pytest.approx(1 / 6, abs=0.05)
    assert all(held_out(claim) for claim in claims if has_held_out_pair(claim))


def test_claims_go_through_json_and_words(scenes: list[Scene]) -> None:
    for seed, drawn in enumerate(scenes[:300]):
        assert Claim.from_json(drawn.claim.to_json()) == drawn.claim
        assert read(drawn.claim.text()) == drawn.claim
        assert agrees(read(caption(drawn, seed)), drawn.claim)


def test_captions_use_every_wording_and_leave_things_out(scenes: list[Scene]) -> None:
    captions = [caption(drawn, seed) for seed, drawn in enumerate(scenes)]
    for wordings in WORDINGS.values():
        for wording in wordings:
            assert any(f" {wording} " in text for text in captions), wording
    without = sum("small" not in text and "large" not in text for text in captions) / len(captions)
    assert 0.1 < without < 0.4
    bare = sum(not any(background in text for background in BACKGROUNDS) for text in captions) / len(captions)
    assert bare == pytest.approx(0.4, abs=0.06)


def test_open_claims_are_filled_and_kept() -> None:
    claim = Claim(Noun("cyan", "heart"), 3)
    full = full_claim(claim, random.Random(0))
    assert full.first.size == "small" and full.background in BACKGROUNDS and full.count == 3
    assert len(place(full, random.Random(0)).things) == 3
    with pytest.raises(ValueError, match=r"'cyan heart': its size is not named"):
        place(claim, random.Random(0))
    with pytest.raises(ValueError, match="shape 'blob' is unknown; choose from: circle"):
        shape_mask("blob", 0, 0, 1)


def test_the_source_draws_only_what_is_stable_across_versions() -> None:
    """`random.random` alone is promised to stay the same; choice, shuffle and randint are not."""
    source = (Path(__file__).parents[2] / "training" / "data" / "shapes.py").read_text()
    assert set(re.findall(r"rng\.(\w+)", source)) == {"random"}


def canonical(text: str) -> str:
    return read(text).text()


def read(text: str) -> Claim:
    """A caption back into its claim, written apart from the code that says it."""
    background = None
    if match := re.search(r" (?:on|against)(?: a)? (white|black|gray)(?: background)?$", text):
        background, text = match.group(1), text[: match.start()]
    for relation, wordings in WORDINGS.items():
        for wording in sorted(wordings, key=len, reverse=True):
            left, found, right = text.partition(f" {wording} ")
            if found:
                return Claim(noun(left)[1], 1, relation, noun(right)[1], background)
    count, first = noun(text)
    return Claim(first, count, background=background)


def noun(text: str) -> tuple[int, Noun]:
    article, *words = text.split()
    count = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}[article]
    size = words.pop(0) if words[0] in SIZES else None
    colour, shape = words
    singular = shape if shape in SHAPES else next(name for name in SHAPES if shape in (name + "s", name + "es"))
    return count, Noun(colour, singular, size)


def agrees(claim: Claim, truth: Claim) -> bool:
    """Whether everything told is true."""
    return (claim.count, claim.relation) == (truth.count, truth.relation) and all(
        claimed is None or claimed == true
        for claimed, true in [
            (claim.background, truth.background),
            *(
                pair
                for one, other in zip(claim.nouns(), truth.nouns(), strict=True)
                for pair in ((one.colour, other.colour), (one.shape, other.shape), (one.size, other.size))
            ),
        ]
    )
