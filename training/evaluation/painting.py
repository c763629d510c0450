"""Paints every prompt's candidates and lets the checker read them.

Takes a model as its users call it and must not look inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from gen.sheet import contact_sheet
from training.data.checker import faults, read
from training.data.suite import Prompt
from training.evaluation.ledger import Judged, Outcome

MODES = {"prior": True, "no_prior": False}  # through an image embedding (unCLIP), or from the text alone
COLUMNS = 16  # candidates of a prompt in a row

Look = Callable[[str, Prompt, list[Image.Image]], None]
"""look(mode, prompt, its pictures best first)"""


class Answer(Protocol):
    """What a call of a model gives back."""

    @property
    def images(self) -> Any:
        """Pillow pictures, flat: prompt by prompt, best first within a prompt."""

    @property
    def scores(self) -> Any:
        """Of each, CLIP's."""

    @property
    def seeds(self) -> Any:
        """Of each."""


class Model(Protocol):
    """A model, called as in `gen.TextToImage`."""

    def __call__(
        self, prompt: list[str], *, num_images_per_prompt: int, rerank: bool, seed: list[int], prior: bool
    ) -> Answer:
        """Paint and rank."""


def paint(
    model: Model,
    prompts: Sequence[Prompt],
    mode: str,
    *,
    num_candidates: int,
    seed: int,
    batch_size: int,  # pictures painted together, at least one prompt's
    look: Look | None = None,
) -> Iterator[list[Outcome]]:
    """Paint and check the prompts at the model's default settings, a batch at a time.

    Candidate k has seed `seed` + its prompt's own + k, whatever else is painted beside it.
    """
    step = max(1, batch_size // num_candidates)
    for batch in (prompts[start : start + step] for start in range(0, len(prompts), step)):
        began = time.perf_counter()
        seeds = [seed + prompt.seed for prompt in batch]
        texts = [prompt.text for prompt in batch]
        answer = model(texts, num_images_per_prompt=num_candidates, rerank=True, seed=seeds, prior=MODES[mode])
        seconds = (time.perf_counter() - began) / len(batch)
        outcomes = []
        for number, prompt in enumerate(batch):
            mine = slice(number * num_candidates, (number + 1) * num_candidates)
            images = list(answer.images[mine])
            candidates = tuple(
                Judged(int(its_seed), float(score), faults(read(np.asarray(image.convert("RGB"))), prompt.claim))
                for its_seed, score, image in zip(answer.seeds[mine], answer.scores[mine], images, strict=True)
            )
            outcomes.append(Outcome(prompt.id, prompt.group, mode, round(seconds, 3), candidates))
            if look is not None:
                look(mode, prompt, images)
        yield outcomes


@dataclass(frozen=True)
class Strips:
    """Keeps each prompt's candidates in rows under its words, best first: `strips/MODE/PROMPT.png`."""

    folder: Path

    def __call__(self, mode: str, prompt: Prompt, images: list[Image.Image]) -> None:
        """Write one."""
        path = self.folder / mode / f"{prompt.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, title=prompt.text, columns=COLUMNS).save(path)
