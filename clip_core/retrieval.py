"""How well CLIP finds the right one among many: recall at k, and top 1 of n. Embeddings in, rates out.

A tie counts as not found, so embeddings that all collapsed to one point score zero, not a hundred per cent.

>>> text, image = clip.text(captions).embedding, clip.image(pixels)  # (B, E) each, of pairs
>>> recall_at_k(text, image, (1, 5))[5] > 0.9  # text to image
True
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def ranks(query: Tensor, gallery: Tensor, relevant: Tensor | None = None) -> Tensor:
    """Place of the best relevant item for each query, (Q,) int64, 0 the first; by cosine.

    `query` (Q, E), `gallery` (G, E); `relevant` (Q, G) bool, None: item i is the only answer to query i.
    Other relevant items above the best one do not push it down; a wrong item at an equal score does.
    """
    similarity = F.normalize(query.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T  # (Q, G)
    if relevant is None:
        if len(query) != len(gallery):
            raise ValueError(f"{len(query)} queries, {len(gallery)} items; give pairs, or relevant")
        relevant = torch.eye(len(query), dtype=torch.bool, device=similarity.device)
    if relevant.shape != similarity.shape or not relevant.any(dim=1).all():
        shape = tuple(similarity.shape)
        raise ValueError(f"relevant is {tuple(relevant.shape)}; give {shape} with an answer to every query")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    # a matrix product may round equal rows apart by an ulp or two; that is still a tie
    wrong = similarity.masked_fill(relevant, -torch.inf) >= best - 1e-6
    return wrong.sum(dim=1)


def recall_at_k(
    query: Tensor, gallery: Tensor, ks: Sequence[int] = (1, 5, 10), relevant: Tensor | None = None
) -> dict[int, float]:
    """Share of queries with a relevant item among the first k (as in Radford et al. 2021, Table 13)."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}; give counts of at least 1")
    place = ranks(query, gallery, relevant)
    return {k: (place < k).float().mean().item() for k in ks}


def top1_of_n(query: Tensor, gallery: Tensor, n: int = 100) -> float:
    """Share of queries whose own item comes first of n: pairs (N, E) in groups of n that follow one another.

    Text to image: captions as query, pictures as gallery. Who calls sees to it that no two captions of a
    group are true of one picture. N must be a multiple of n.
    """
    if query.shape != gallery.shape or n < 1 or len(query) == 0 or len(query) % n:
        given = f"{tuple(query.shape)} queries, {tuple(gallery.shape)} items and n = {n}"
        raise ValueError(f"{given}; give as many items as queries, a multiple of n, n >= 1")
    places = [ranks(query[i : i + n], gallery[i : i + n]) for i in range(0, len(query), n)]
    return (torch.cat(places) == 0).float().mean().item()
