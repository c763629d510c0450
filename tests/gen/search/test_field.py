"""Searches of one's own: what they see and may ask for, and what they may not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from gen import Step, TextToImage
from gen.search import Field, Go, Moves, Scout
from tests.engines import run
from tests.gen.search.asked import ASKED, STEPS


@dataclass(frozen=True)
class Own:
    """A search that a test writes."""

    moves: Callable[[Field], Moves]
    name = "own"

    def check(self, asked: Any) -> None:
        pass

    def __call__(self, field: Field) -> Moves:
        return self.moves(field)


def test_a_search_of_ones_own_sees_and_asks(tiny: TextToImage) -> None:
    seen: list[Any] = []

    def moves(field: Field) -> Moves:
        first, *others = field.candidates
        seen.extend([field.keep, field.num_steps, field.seconds_left(), field.scores])
        yield Go([first])
        seen.append(list(field.scores))
        yield Go(others, until=9)
        field.drop(others[1:])
        yield Go(others[:1])

    result = tiny.paint([replace(ASKED, prompt="a star", seed=3, prior=False, search=Own(moves))])[0]
    assert seen == [2, STEPS, math.inf, {}, [0]]
    assert [each.painted for each in result.candidates] == [True, True] + [False] * 6
    assert result.account.evaluations["decoder"] == 2 * (10 + 7 * 9 + 1)


def drops_everything(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop(field.candidates)


def takes_the_dropped(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop(field.candidates[1:])
    yield Go(field.candidates)


def goes_back(field: Field) -> Moves:
    yield Go(field.candidates, until=5)
    yield Go(field.candidates, until=4)


def drops_the_painted(field: Field) -> Moves:
    yield Go(field.candidates)
    field.drop(field.candidates)


def names_nobody(field: Field) -> Moves:
    yield Go([100])


def drafts_the_begun(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    yield Scout(field.candidates, 2)


def branches_the_painted(field: Field) -> Moves:
    yield Go(field.candidates)
    field.branch(field.candidates[0], field.candidates[1:])


def turns_the_begun(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.turn(field.candidates[0], field.candidates[1:], 0.5)


def names_twice(field: Field) -> Moves:
    yield Go([*field.candidates, field.candidates[0]], until=2)


def stops_at_the_end(field: Field) -> Moves:
    yield Go(field.candidates, until=field.num_steps)
    yield Go(field.candidates)


def drafts_in_no_steps(field: Field) -> Moves:
    yield Scout(field.candidates, 0)


def looks_at_nothing(field: Field) -> Moves:
    field.previews(field.candidates)
    yield Go(field.candidates)


def drops_anothers(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop([(field.candidates[0] + 8) % 16])
    yield Go(field.candidates)


def branches_to_the_dropped(field: Field) -> Moves:
    yield Go(field.candidates, until=2)
    field.drop(field.candidates[1:])
    field.branch(field.candidates[0], field.candidates[1:])
    yield Go(field.candidates[:1])


def will_not_end(field: Field) -> Moves:
    try:
        yield Go(field.candidates, until=2)
        field.drop([100])
    finally:
        yield Go(field.candidates)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (drops_everything, "gave up every candidate"),
        (takes_the_dropped, "takes candidate 1 on"),
        (goes_back, "which it has behind it"),
        (drops_the_painted, "which are given up or painted"),
        (names_nobody, r"names candidates \[100\]; give each once, of its own"),
        (names_twice, "give each once, of its own"),
        (stops_at_the_end, "takes candidates to step 10 of 10; leave until out"),
        (drafts_in_no_steps, "scouts in 0 steps; give 1 or more"),
        (looks_at_nothing, "looks at candidates .* which have not begun or are painted"),
        (drops_anothers, "give each once, of its own"),
        (branches_to_the_dropped, "which have not all halted"),
        (drafts_the_begun, "given up, painted or begun"),
        (branches_the_painted, "which have not all halted"),
        (turns_the_begun, "of these some have begun"),
    ],
)
def test_a_search_that_asks_for_nonsense_fails_its_request_alone(
    tiny: TextToImage, moves: Callable[[Field], Moves], message: str
) -> None:
    engine = tiny.engine()
    other = engine.submit(replace(ASKED, search="halving"))
    gone = engine.submit(replace(ASKED, search=Own(moves)))
    run(engine)
    with pytest.raises(ValueError, match=message):
        gone.result(timeout=0)
    assert len(other.result(timeout=0).images) == 4
    assert not engine._stages.rows["decoder"].live


@pytest.mark.parametrize("way", ["cancelled", "refused"])
def test_a_search_that_will_not_end_is_let_go(tiny: TextToImage, way: str) -> None:
    """Neither its request's end nor the engine's waits for it, or fails by it."""
    engine = tiny.engine()
    other = engine.submit(replace(ASKED, search="halving"))

    def refuse(step: Step) -> None:
        if way == "refused" and step.stage == "decoder":
            step.cancel()

    gone = engine.submit(replace(ASKED, search=Own(will_not_end)), callback=refuse)
    engine.tick()
    if way == "cancelled":
        assert gone.cancel()
    run(engine)
    assert gone.done() and len(other.result(timeout=0).images) == 4


def test_noise_that_was_handed_in_is_not_turned(tiny: TextToImage) -> None:
    def turns(field: Field) -> Moves:
        field.turn(field.candidates[0], field.candidates[1:], 0.5)
        yield Go(field.candidates)

    asked = replace(ASKED, prior=False, latents=torch.zeros(16, 4, 8, 8), search=Own(turns))
    with pytest.raises(ValueError, match="leave latents out"):
        tiny.paint([asked])
