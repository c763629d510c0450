"""What is refused of a search, in one line and before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gen import TextToImage
from gen.search import Draft, FeynmanKac, Halving, Racing, ZeroOrder
from tests.gen.search.asked import ASKED, Counted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"search": object()}, "search is object, which is none that was made; give one, or a name: best_of, draft"),
        ({"search": Halving}, "search is Halving, which is none that was made"),
        ({"search": "best"}, "search 'best' is unknown; choose from: best_of, draft, feynman_kac, halving"),
        ({"budget": 0}, "budget=0 is out of range; give a number of seconds above 0"),
        ({"budget": -1.5}, "budget=-1.5 is out of range; give a number of seconds above 0"),
        ({"budget": True}, "budget=True is of type bool; give a number of seconds above 0"),
        ({"budget": math.inf}, "budget=inf is out of range"),
        ({"search": "halving", "keep": None, "rerank": False}, "search 'halving' goes by CLIP's scores"),
        ({"search": "halving", "keep": 8}, "search 'halving' gives candidates up, but keep=8 of 8 keeps them all"),
        ({"search": "draft", "keep": None}, "search 'draft' gives candidates up, but keep=8 of 8"),
        ({"search": "racing", "keep": None}, "search 'racing' gives candidates up"),
        ({"search": "feynman_kac"}, "search 'feynman_kac' copies pictures .* give eta above 0"),
        ({"search": "zero_order", "latents": torch.zeros(16, 4, 8, 8)}, "draws its own noise; leave latents out"),
        ({"diverse": True, "keep": None}, "diverse=True chooses among candidates, but all are kept"),
        ({"diverse": "yes"}, "diverse='yes'; give True or False"),
        ({"keep": 5000, "num_images_per_prompt": None, "budget": 1.0}, "keep=5000 is more than num_images_per_prompt"),
    ],
)
def test_mistakes_are_told_before_any_work(counted: Counted, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        counted.model.paint([replace(ASKED, **words)])
    assert "\n" not in str(raised.value) and not counted.seen


@pytest.mark.parametrize(
    "make",
    [
        lambda: Halving(rungs=(0.0,)),
        lambda: Halving(goes_on=1.0),
        lambda: Draft(steps=1.5),
        lambda: Draft(goes_on=-0.1),
        lambda: Racing(rung=1.0),
        lambda: Racing(wave=0),
        lambda: FeynmanKac(rungs=(2.0,)),
        lambda: ZeroOrder(share=0.0),
        lambda: ZeroOrder(rounds=0),
    ],
)
def test_a_search_refuses_what_makes_no_sense(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="out of range; give"):
        make()


@pytest.mark.parametrize(
    "path",
    [
        None,
        [{"seed": 1}],
        ["seed"],
        [{"seed": -1, "steps": 1, "share": 0.0}],
        [{"seed": 1, "steps": 1, "share": 2.0}],
    ],
)
def test_a_damaged_noise_path_is_refused(tiny: TextToImage, path: Any) -> None:
    record = tiny.paint([replace(ASKED, prompt="a star", seed=1)])[0].records[0] | {"noise_path": path}
    with pytest.raises(ValueError, match=r"noise_path|out of range"):
        tiny.repaint(record)
