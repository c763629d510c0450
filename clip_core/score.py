"""How well pictures fit words: cosines, and which candidates to keep. Tensors stay on their device.

This ranks embeddings that someone else made (`clip_core.clip.CLIP`); it opens no file and makes nothing wait
for the device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(image: Tensor, text: Tensor) -> Tensor:
    """Cosine of each image (B, E) with its text (B, E), or with one text (1, E) or (E,): (B,) float32."""
    if image.ndim != 2 or text.shape[-1] != image.shape[1] or (text.ndim == 2 and len(text) not in (1, len(image))):
        given = f"image {tuple(image.shape)} and text {tuple(text.shape)}"
        raise ValueError(f"{given} do not pair; give (B, E) and as many texts, or one")
    with torch.autocast(image.device.type, enabled=False):  # half precision would tie near candidates
        return (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(dim=-1)


def keep_best(scores: Tensor, keep: int | None = None) -> Tensor:
    """Candidates of each prompt in order of their score, best first: (P, n) -> indices (P, keep).

    Equal scores stay in drawing order; a score that is not a number comes last. None keeps all.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores are {tuple(scores.shape)}; give (prompts, candidates of each)")
    keep = scores.shape[1] if keep is None else keep
    if not 1 <= keep <= scores.shape[1]:
        raise ValueError(f"keep is {keep}; give 1 to {scores.shape[1]}, the number of candidates")
    order = torch.sort(scores.nan_to_num(nan=-torch.inf), dim=1, descending=True, stable=True).indices
    return order[:, :keep]
