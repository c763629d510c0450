"""The evaluation against painters whose truth is known, and through the command on a tiny random model."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_core.clip import CLIP
from gen.sheet import GAP, TILE
from tests.tiny import tiny_clip, tiny_tokenizer
from training.data.shapes import full_claim, place, render
from training.data.suite import Prompt, load
from training.evaluate import (
    MODES,
    Candidate,
    Ledger,
    Outcome,
    bootstrap,
    evaluate,
    fault_table,
    retrieval,
    summarise,
    table,
    wilson,
)

CLAIMS = {prompt.text: prompt.claim for prompt in load()}


@dataclass
class Pictures:
    images: list[Image.Image]
    scores: list[float]
    seeds: list[int]


@dataclass
class Draughtsman:
    """Draws what it is asked for where `right(seed)`, else in another colour; ranked by `score`."""

    right: Callable[[int], bool] = lambda seed: True
    score: Callable[[int], float] = lambda seed: -float(seed)
    stop_after: int | None = None  # calls, then Ctrl-C
    calls: list[tuple[list[str], bool]] = field(default_factory=list)

    def __call__(
        self, prompt: list[str], *, num_images_per_prompt: int, rerank: bool, seed: list[int], prior: bool
    ) -> Pictures:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((prompt, prior))
        pictures = Pictures([], [], [])
        for text, start in zip(prompt, seed, strict=True):
            for each in sorted(range(start, start + num_images_per_prompt), key=self.score, reverse=True):
                claim = CLAIMS[text]
                if not self.right(each):
                    colour = "red" if claim.first.colour != "red" else "blue"
                    claim = replace(claim, first=replace(claim.first, colour=colour))
                rng = random.Random(each)
                pictures.images.append(Image.fromarray(render(place(full_claim(claim, rng), rng))))
                pictures.scores.append(self.score(each))
                pictures.seeds.append(each)
        return pictures


def some(number: int) -> list[Prompt]:
    """The first prompts of each group, in the file's order."""
    prompts = load()
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    return [each for group in groups for each in [one for one in prompts if one.group == group][:number]]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(tiny_clip(tokenizer := tiny_tokenizer()), tokenizer)


def measured(model: Draughtsman, clip: CLIP, folder: Path, number: int = 3, **words: Any) -> dict[str, Any]:
    words = {"about": {"model": "drawn"}, "num_candidates": 4, "batch_size": 8} | words
    return evaluate(model, clip, some(number), folder, **words)


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


def test_a_line_cut_short_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    outcomes = [Outcome(f"one-{i:03d}", "one", "prior", 1.0, (Candidate(i, 0.5, ("shape",)),)) for i in range(3)]
    Ledger(path, {"model": "m"}).append(outcomes)
    whole = path.read_text()
    path.write_text(whole[:-20])
    ledger = Ledger(path, {"model": "m"})
    assert ledger.outcomes == outcomes[:2]
    ledger.append(outcomes[2:])
    assert path.read_text() == whole and Ledger(path, {"model": "m"}).outcomes == outcomes
    path.write_text(whole.replace('"group"', "group"))
    with pytest.raises(ValueError, match="is damaged"):
        Ledger(path, {"model": "m"})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "candidates.jsonl", Path("/proc/unclip/candidates.jsonl")):
        with pytest.raises(ValueError, match=r"candidates.jsonl cannot be written \(.*\); give another folder"):
            Ledger(path, {})


def test_no_two_candidates_of_the_suite_share_a_seed() -> None:
    seeds = [prompt.seed + k for prompt in load() for k in range(16)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**31


def test_a_seed_out_of_range_is_refused(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one from 0 to"):
        measured(Draughtsman(), clip, tmp_path, seed=2**31)
    assert not list(tmp_path.iterdir())


def test_each_prompt_keeps_its_candidates_as_a_strip(clip: CLIP, tmp_path: Path) -> None:
    measured(Draughtsman(), clip, tmp_path, number=1)
    strips = sorted(path.relative_to(tmp_path / "strips").as_posix() for path in tmp_path.rglob("*.png"))
    names = ("count-000", "held_out-000", "one-000", "relation-000")
    assert strips == [f"{mode}/{name}.png" for mode in ("no_prior", "prior") for name in names]
    with Image.open(tmp_path / "strips" / strips[0]) as strip:
        assert strip.width == GAP + 4 * (TILE + GAP) and TILE < strip.height < 2 * TILE


def test_wilson_is_the_textbook_interval() -> None:
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)  # Brown, Cai and DasGupta 2001
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert wilson(10, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert wilson(0, 0) == [0, 1]


def test_the_bootstrap_draws_prompts_not_candidates() -> None:
    """All-or-nothing prompts are as uncertain as one candidate each; 1.96 standard errors on both sides."""
    shares = np.array([0.0, 1.0] * 50)
    low, high = bootstrap(shares)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(100), rel=0.1)
    assert bootstrap(np.full(20, 0.5)) == [0.5, 0.5]
    assert bootstrap(shares) == bootstrap(shares)


def test_each_mode_and_group_is_counted_by_itself() -> None:
    right, wrong = Candidate(0, 0.9, ()), Candidate(1, 0.1, ("count", "shape"))
    outcomes = [
        Outcome("one-000", "one", "prior", 1.0, (right, wrong)),
        Outcome("count-000", "count", "prior", 1.0, (wrong, wrong)),
        Outcome("one-000", "one", "no_prior", 1.0, (wrong, right)),
    ]
    summary = summarise(outcomes)
    assert summary["prior"]["one"]["best"]["rate"] == 1 and summary["no_prior"]["one"]["best"]["rate"] == 0
    assert summary["prior"]["count"]["any"]["rate"] == 0
    assert summary["prior"]["count"]["faults"]["all"] == dict.fromkeys(
        summary["prior"]["count"]["faults"]["all"], 0
    ) | {"count": 1, "shape": 1}


@dataclass
class Exact:
    """Towers that give pictures and captions of a known permutation the same one-hot embedding."""

    order: list[int]

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(pixels))

    def text(self, texts: list[str]) -> "Exact":
        self.embedding = torch.eye(len(texts))[self.order] * 3
        return self


def test_retrieval_counts_captions_that_find_their_picture() -> None:
    prompts = [prompt for prompt in load() if prompt.group == "retrieval"]
    order = list(range(len(prompts)))
    assert retrieval(Exact(order), prompts)["text_to_image"]["rate"] == 1
    order[:20] = order[1:20] + order[:1]
    found = retrieval(Exact(order), prompts)
    assert found["text_to_image"]["rate"] == found["image_to_text"]["rate"] == 0.8
    assert found["by_kind"] == {"one": pytest.approx(1 / 3), "relation": 1, "count": 1}


def test_retrieval_by_a_real_clip_is_its_own_scores(clip: CLIP) -> None:
    prompts = [prompt for prompt in load() if prompt.group == "retrieval"][::5]
    pixels = torch.stack([torch.from_numpy(each.picture()) for each in prompts]).permute(0, 3, 1, 2) / 255
    scores = torch.stack([clip.score(pixels, prompt.text) for prompt in prompts])  # (texts, pictures)
    expected = (scores.argmax(dim=1) == torch.arange(len(prompts))).float().mean().item()
    assert retrieval(clip, prompts)["text_to_image"]["rate"] == pytest.approx(expected)


def test_the_tables_show_every_measure(clip: CLIP, tmp_path: Path) -> None:
    result = measured(Draughtsman(), clip, tmp_path)
    lines = table(result).splitlines()
    assert len(lines) == 2 + 4 * len(MODES) + 1
    assert len({line.count("|") for line in lines}) == 1
    assert "best of 4" in lines[0] and "| 100.0 % (44–100) |" in lines[2]
    assert len({line.count("|") for line in fault_table(result).splitlines()}) == 1
    assert json.loads(json.dumps(result)) == result
    assert {"date", "commit", "machine", "versions", "seconds", "num_candidates"} <= set(result)
