"""Which pictures go on: a search decides that and never what a picture's pixels are.

Best-of-N (Ramesh et al. 2021, section 2.6) is the one there is: all are painted, CLIP scores them, the best
are kept. It knows scores and their order, not how they were made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clip_core.score import keep_best


def best_of(scores: Sequence[float], num_images_per_prompt: int, keep: int) -> list[list[int]]:
    """Per prompt the indices of its `keep` best candidates, best first; of equals the earlier one."""
    best = keep_best(torch.tensor(scores, dtype=torch.float64).view(-1, num_images_per_prompt), keep)
    firsts = range(0, len(scores), num_images_per_prompt)
    return [[first + index for index in indices] for first, indices in zip(firsts, best.tolist(), strict=True)]


def drawing_order(num_candidates: int, num_images_per_prompt: int) -> list[list[int]]:
    """Per prompt the indices of all its candidates, as they were drawn."""
    firsts = range(0, num_candidates, num_images_per_prompt)
    return [list(range(first, first + num_images_per_prompt)) for first in firsts]
