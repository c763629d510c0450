"""A painter whose truth is known, and an evaluation of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from clip_core.clip import CLIP
from training.data.shapes import full_claim, place, render
from training.data.suite import Prompt, load
from training.evaluation.measure import evaluate

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


def measured(model: Draughtsman, clip: CLIP, folder: Path, number: int = 3, **words: Any) -> dict[str, Any]:
    words = {"about": {"model": "drawn"}, "num_candidates": 4, "batch_size": 8} | words
    return evaluate(model, clip, some(number), folder, **words)
