"""The whole evaluation, of painters whose truth is known and of a tiny random model."""

from dataclasses import replace
from pathlib import Path

import pytest

from clip_core.clip import CLIP
from tests.tiny import make_tiny_stable_unclip
from tests.training.evaluation.draughtsman import Draughtsman, measured, some
from training.data.suite import load
from training.evaluation.measure import first_of_each_group, measure
from training.evaluation.painting import MODES


def test_a_painter_that_is_always_right_reaches_everything(clip: CLIP, tmp_path: Path) -> None:
    model = Draughtsman()
    result = measured(model, clip, tmp_path, number=10, num_candidates=2)
    assert set(result["painted"]) == set(MODES)
    for groups in result["painted"].values():
        assert set(groups) == {"one", "relation", "count", "held_out"}
        for rates in groups.values():
            assert rates["all"]["rate"] == rates["best"]["rate"] == rates["any"]["rate"] == 1
            assert not any(rates["faults"]["all"].values())
    assert {prior for _, prior in model.calls} == {True, False}


def test_rates_are_what_the_painter_got_right(clip: CLIP, tmp_path: Path) -> None:
    """One of the four seeds is right; the ranking puts it first, last, or first for half of the prompts."""
    prompts = some(6)
    starts = {prompt.seed for prompt in prompts}
    first_right = Draughtsman(right=lambda seed: seed in starts)
    result = measured(first_right, clip, tmp_path / "a", number=6)
    rates = result["painted"]["prior"]["one"]
    assert (rates["all"]["rate"], rates["chance"]) == (0.25, 0.25)
    assert (rates["best"]["rate"], rates["any"]["rate"]) == (1, 1)
    assert rates["best_of"] == {"1": 1, "2": 1, "4": 1}
    assert rates["faults"]["all"]["colour"] == 0.75 and rates["faults"]["best"]["colour"] == 0

    ranked_last = replace(first_right, score=float, calls=[])  # the last seed scores best
    rates = measured(ranked_last, clip, tmp_path / "b", number=6)["painted"]["no_prior"]["relation"]
    assert (rates["all"]["rate"], rates["best"]["rate"], rates["any"]["rate"]) == (0.25, 0, 1)
    assert rates["best_of"] == {"1": 1, "2": 0, "4": 0}
    assert rates["faults"]["best"]["colour"] == 1


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(clip: CLIP, tmp_path: Path) -> None:
    whole = measured(Draughtsman(right=lambda seed: seed % 3 > 0), clip, tmp_path / "whole")
    model = Draughtsman(right=lambda seed: seed % 3 > 0, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        measured(model, clip, tmp_path / "parts")
    painted = {(text, prior) for texts, prior in model.calls for text in texts}
    assert len(painted) == 6  # three batches of two prompts
    again = replace(model, stop_after=None, calls=[])
    seen: list[tuple[int, int]] = []
    result = measured(again, clip, tmp_path / "parts", progress=lambda done, total: seen.append((done, total)))
    assert not painted & {(text, prior) for texts, prior in again.calls for text in texts}
    assert seen[0] == (6, 24) and seen[-1] == (24, 24)
    for groups in (*result["painted"].values(), *whole["painted"].values()):
        for rates in groups.values():
            del rates["seconds"]
    assert result["painted"] == whole["painted"]


def test_a_folder_holds_one_evaluation(clip: CLIP, tmp_path: Path) -> None:
    measured(Draughtsman(), clip, tmp_path, number=1)
    with pytest.raises(ValueError, match="holds an evaluation of num_candidates 4, not 2; remove it, or give"):
        measured(Draughtsman(), clip, tmp_path, number=1, num_candidates=2)
    with pytest.raises(ValueError, match="holds an evaluation of model 'drawn', not 'other'"):
        measured(Draughtsman(), clip, tmp_path, number=1, about={"model": "other"})
    more = Draughtsman()
    measured(more, clip, tmp_path, number=2)  # a quick look grows into a longer one
    assert sum(len(texts) for texts, _ in more.calls) == 8


def test_a_seed_out_of_range_is_refused(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one from 0 to"):
        measured(Draughtsman(), clip, tmp_path, seed=2**31)
    assert not list(tmp_path.iterdir())


def test_the_same_seeds_give_the_same_outcome(tmp_path: Path) -> None:
    model = str(make_tiny_stable_unclip(tmp_path / "model"))
    first, second = (
        measure(model, tmp_path / str(rows), number=2, limit=1, batch_size=rows, quiet=True) for rows in (2, 8)
    )
    for result in (first, second):
        for key in ("seconds", "date"):
            del result[key]
        for groups in result["painted"].values():
            for rates in groups.values():
                del rates["seconds"]
    assert first == second


def test_a_quick_look_is_at_the_first_of_each_group() -> None:
    prompts = load()
    few = first_of_each_group(prompts, 2)
    assert [prompt for prompt in few if prompt.group != "retrieval"] == [
        prompt for prompt in some(2) if prompt.group != "retrieval"
    ]
    assert [prompt.group for prompt in few].count("retrieval") == 100
    assert first_of_each_group(prompts, 1000) == prompts
