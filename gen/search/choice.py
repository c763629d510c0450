"""Which of the painted pictures are kept, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_core.score import keep_best

NEAR_QUANTILE = 0.75  # two pictures are near-copies where they are as alike as the most alike quarter of all pairs


def best_first(scores: Sequence[float], num_images_per_prompt: int, keep: int) -> list[list[int]]:
    """Per prompt the indices of its `keep` best candidates, best first; of equals the earlier one."""
    best = keep_best(torch.tensor(scores, dtype=torch.float64).view(-1, num_images_per_prompt), keep)
    firsts = range(0, len(scores), num_images_per_prompt)
    return [[first + index for index in indices] for first, indices in zip(firsts, best.tolist(), strict=True)]


def diverse_first(embeddings: Tensor, keep: int) -> list[int]:
    """Which `keep` of pictures, given best first by CLIP embeddings (B, E), so that no two are near-copies.

    Greedy, from the best on: a picture is kept unless its cosine with one kept before reaches the upper quartile of
    all pairs of these pictures. Where that leaves too few, the best of the others follow. The bound is relative since
    what cosine a copy has depends on the CLIP and the prompt. Places in the order given, best first.
    """
    number = len(embeddings)
    if number < 2:
        return list(range(number))[:keep]
    unit = F.normalize(embeddings.float(), dim=-1)
    alike = (unit @ unit.T).cpu()
    pairs = alike[tuple(torch.triu_indices(number, number, 1))]
    bound = float(np.quantile(pairs.numpy(), NEAR_QUANTILE))  # torch's takes no more than 2^24 of them
    chosen: list[int] = []
    for index in range(number):
        if len(chosen) < keep and not bool((alike[index, chosen] >= bound).any()):
            chosen.append(index)
    others = [index for index in range(number) if index not in chosen]
    return sorted(chosen + others[: max(keep - len(chosen), 0)])


def drawing_order(num_candidates: int, num_images_per_prompt: int) -> list[list[int]]:
    """Per prompt the indices of all its candidates, as they were drawn."""
    firsts = range(0, num_candidates, num_images_per_prompt)
    return [list(range(first, first + num_images_per_prompt)) for first in firsts]
