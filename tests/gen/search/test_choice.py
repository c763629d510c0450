"""Which of the painted pictures are kept where they are to differ."""

from __future__ import annotations

from dataclasses import replace

import torch

from gen import TextToImage
from gen.search import diverse_first
from tests.gen.search.asked import ASKED


def test_near_copies_are_passed_over() -> None:
    one, other, third = torch.eye(3)
    ranked = torch.stack([one, one + 0.01 * other, other, one - 0.01 * third, other + 0.02 * one, third])
    assert diverse_first(ranked, 3) == [0, 2, 5]
    assert diverse_first(ranked, 2) == [0, 2]
    assert diverse_first(ranked, 4) == [0, 1, 2, 5]  # there is no fourth, so the best of the others follows
    assert diverse_first(ranked, 6) == [0, 1, 2, 3, 4, 5]
    assert diverse_first(one.expand(4, 3), 2) == [0, 1]
    assert diverse_first(ranked[:1], 3) == [0]


def test_thousands_of_pictures_have_a_quartile() -> None:
    """6000 of them have more pairs than torch.quantile takes."""
    rng = torch.Generator().manual_seed(0)
    chosen = diverse_first(torch.randn(6000, 4, generator=rng), 3)
    assert chosen[0] == 0 and len(chosen) == 3


def test_diverse_keeps_other_pictures_and_the_best(tiny: TextToImage) -> None:
    request = replace(ASKED, num_images_per_prompt=12, keep=3, seed=9, prompt="a star")
    plain, diverse = tiny.paint([request])[0], tiny.paint([replace(request, diverse=True)])[0]
    everything = tiny.paint([replace(request, keep=None)])[0]
    clip = tiny.model.clip
    assert clip is not None
    with torch.no_grad():
        embeddings = clip.image((everything.images * 255).round() / 255)
    assert diverse.seeds == [everything.seeds[index] for index in diverse_first(embeddings, 3)]
    assert diverse.seeds[0] == plain.seeds[0] and diverse.seeds != plain.seeds
    assert diverse.scores == sorted(diverse.scores or [], reverse=True)
