"""Searches within seconds, by a clock that runs where the networks work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from gen import Request, Result, TextToImage
from gen.engine import Engine
from gen.search import Draft, Halving
from tests.engines import altered, run
from tests.gen.search.asked import ASKED, STEPS
from tests.pictures import LEVEL


class Clock:
    """Seconds that pass where the networks work: each evaluation, decode and score takes a while."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def of(self, function: Callable[..., Tensor], seconds: float) -> Callable[..., Tensor]:
        def call(given: Tensor, *rest: Any) -> Tensor:
            self.now += seconds * len(given)
            return function(given, *rest)

        return call


EVALUATION, DECODE = 0.05, 0.5  # seconds
ONE = 2 * STEPS * EVALUATION + DECODE  # a candidate, alone: 1.5 seconds


@pytest.fixture
def timed(tiny: TextToImage) -> tuple[TextToImage, Clock]:
    """A model whose work takes seconds of a clock of its own; its memory is measured already."""
    clock = Clock()
    model = altered(tiny, call=clock.of(tiny.model.call, EVALUATION), decode=clock.of(tiny.model.decode, DECODE))
    model.paint([replace(ASKED, prior=False)])
    clock.now = 0.0
    return model, clock


def spent(timed: tuple[TextToImage, Clock], request: Request) -> tuple[Result, float]:
    model, clock = timed
    engine = Engine(model.model, model._result, buckets=model._buckets, clock=clock)
    began = clock.now
    future = engine.submit(request)
    run(engine)
    return future.result(timeout=0), clock.now - began


BUDGETED = replace(ASKED, prompt="a star", seed=5, num_images_per_prompt=None, prior=False, keep=1)


@pytest.mark.parametrize("seconds", [3.1, 7.0, 16.0, 40.0])
def test_as_many_candidates_are_painted_as_fit(timed: tuple[TextToImage, Clock], seconds: float) -> None:
    result, took = spent(timed, replace(BUDGETED, budget=seconds))
    painted = [each for each in result.candidates if each.painted]
    assert 0.75 * seconds - ONE < took <= seconds and len(painted) == round(took / ONE)
    assert result.scores == [max(each.score for each in painted)]  # type: ignore[type-var]
    assert result.account.decodes == result.account.scores == len(painted)


@pytest.mark.parametrize("seconds", [0.001, 0.3, 1.2])
def test_a_budget_too_small_for_one_paints_one(timed: tuple[TextToImage, Clock], seconds: float) -> None:
    result, took = spent(timed, replace(BUDGETED, budget=seconds, keep=3))
    assert len(result.images) == 1 and took <= ONE + 1e-9


def test_waiting_for_room_is_spent_from_a_budget(timed: tuple[TextToImage, Clock]) -> None:
    model, clock = timed
    engine = Engine(model.model, model._result, max_rows=16, buckets=model._buckets, clock=clock)
    first, late = engine.submit(replace(ASKED, prior=False)), engine.submit(replace(BUDGETED, budget=7.0))
    run(engine)
    assert len(first.result(timeout=0).images) == 4 and clock.now > 16 * ONE
    assert [each.painted for each in late.result(timeout=0).candidates].count(True) == 1
    alone, _ = spent(timed, replace(BUDGETED, budget=7.0))
    assert [each.painted for each in alone.candidates].count(True) > 1


@pytest.mark.parametrize("search", ["best_of", "halving", "draft", "racing"])
@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_a_budget_is_overrun_by_a_step_at_most_once_something_is_painted(
    timed: tuple[TextToImage, Clock], search: str, slow: float
) -> None:
    """Also where the work becomes slower than it was measured to be."""
    model, clock = timed
    fast = model.model.call

    def call(x: Tensor, *rest: Any) -> Tensor:
        if clock.now > 5:
            clock.now += (slow - 1) * EVALUATION * len(x)
        return fast(x, *rest)

    vars(model.model)["call"] = call
    result, took = spent((model, clock), replace(BUDGETED, budget=12.0, search=search, keep=2))
    step = 2 * 16 * slow * EVALUATION
    assert took <= 12.0 + step + 16 * DECODE * (slow == 1.0)
    painted = sum(each.painted for each in result.candidates)
    assert painted >= (2 if slow == 1.0 else 1)  # a round that the slowness hits is lost


@pytest.mark.parametrize("search", ["best_of", "halving", "draft", "zero_order"])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("ticks", range(0, 16, 3))
def test_whenever_time_is_over_each_prompt_has_a_picture(
    tiny: TextToImage, search: str, prior: bool, ticks: int
) -> None:
    """The deadline falls into every stage of a search of which nothing is painted yet."""
    clock = Clock()
    engine = Engine(tiny.model, tiny._result, max_rows=5, clock=clock)
    asked = {"search": search, "prior": prior, "budget": 100.0, "keep": 2}
    future = engine.submit(replace(ASKED, **asked))  # type: ignore[arg-type]
    for _ in range(ticks):
        engine.tick()
    clock.now = 101.0
    run(engine)
    result = future.result(timeout=0)
    assert set(result.prompts) == set(ASKED.prompt or ())
    for image, record in zip(result.images, result.records, strict=True):
        assert (tiny.repaint(record) - image).abs().max() <= LEVEL


def test_of_a_search_cut_short_the_nearest_picture_is_finished(tiny: TextToImage) -> None:
    """A draft that is under way is no picture: the candidate is painted from the beginning."""
    for search in (Halving(rungs=(0.5,)), Draft(steps=0.5), "best_of"):
        clock = Clock()
        engine = Engine(tiny.model, tiny._result, clock=clock)
        future = engine.submit(replace(ASKED, prior=False, search=search, budget=100.0))
        for _ in range(3):
            engine.tick()
        clock.now = 101.0
        engine.tick()
        assert len(engine._stages.rows["decoder"].live) == 2  # of two prompts
        run(engine)
        assert len(future.result(timeout=0).images) == 2
