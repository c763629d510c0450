"""Which pictures go on: a search decides that and never what a picture's pixels are.

Best-of-N (Ramesh et al. 2021, section 2.6): all are painted, CLIP scores them, the best are kept. A `Rule` may say
earlier, after every step, which candidates of its request to give up. All this knows how candidates stand, not how
they got there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clip_core.score import keep_best

Stage = Literal["waiting", "prior", "decoder", "painted"]


@dataclass(frozen=True, eq=False)
class Standing:
    """How a candidate stands after a step."""

    candidate: int  # its place in drawing order
    seed: int
    stage: Stage = "waiting"
    steps_taken: int = 0  # of that stage
    x0: Tensor | None = None  # the stage's latest clean estimate, on the device: an embedding (E,) or latents (C, h, w)
    score: Tensor | None = None  # (), on the device; None: not painted yet, or not ranked


Rule = Callable[[Sequence[Standing]], Collection[int]]
"""rule(the candidates of a request that were not given up yet) -> which of them to give up now"""


def best_of(scores: Sequence[float], num_images_per_prompt: int, keep: int) -> list[list[int]]:
    """Per prompt the indices of its `keep` best candidates, best first; of equals the earlier one."""
    best = keep_best(torch.tensor(scores, dtype=torch.float64).view(-1, num_images_per_prompt), keep)
    firsts = range(0, len(scores), num_images_per_prompt)
    return [[first + index for index in indices] for first, indices in zip(firsts, best.tolist(), strict=True)]


def drawing_order(num_candidates: int, num_images_per_prompt: int) -> list[list[int]]:
    """Per prompt the indices of all its candidates, as they were drawn."""
    firsts = range(0, num_candidates, num_images_per_prompt)
    return [list(range(first, first + num_images_per_prompt)) for first in firsts]
