"""Rates and their intervals by hand, and retrieval by towers whose answers are known."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from clip_core.clip import CLIP
from training.data.suite import load
from training.evaluation.ledger import Judged, Outcome
from training.evaluation.rates import bootstrap, retrieval, summarise, wilson


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
    right, wrong = Judged(0, 0.9, ()), Judged(1, 0.1, ("count", "shape"))
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
