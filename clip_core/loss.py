"""The contrastive loss that trains CLIP (Radford et al. 2021, Figure 3), repeated captions counted as true.

It takes embeddings and says how wrong they are. It knows no model, optimiser or process: who trains keeps
the temperature in range with `clamp_logit_scale_` after every optimiser step.
"""

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5: logits are never scaled by more than 100


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, captions_equal: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, Figure 3), equal captions positive (UniCL, Yang et al. 2022).

    `image` and `text` are (B, E), normalised here. `logit_scale` is the logarithm of 1 / temperature, as CLIP
    models hold it. `captions_equal` (B, B) is true where captions i and j say the same (`equal_captions`
    makes it); the mass of a row's target is then shared among all its positives. None: every caption is its
    own only match. Returns the mean of both directions, a float32 scalar.
    """
    if image.ndim != 2 or image.shape != text.shape:
        given = f"image {tuple(image.shape)} and text {tuple(text.shape)}"
        raise ValueError(f"{given} must be two matrices of one shape (B, E)")
    rows = image.shape[0]
    if captions_equal is not None and captions_equal.shape != (rows, rows):
        raise ValueError(f"captions_equal is {tuple(captions_equal.shape)}; give ({rows}, {rows}), or None")
    with torch.autocast(image.device.type, enabled=False):  # logits up to 100 need more than half precision
        scale = torch.as_tensor(logit_scale, dtype=torch.float32, device=image.device)
        # clamp() may have no gradient at the limit, and a temperature that reached it could not come back
        scale = scale - (scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        logits = scale.exp() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T  # (B, B)
        same = torch.eye(rows, dtype=torch.bool, device=image.device)
        if captions_equal is not None:
            same = same | captions_equal.to(image.device, torch.bool)
        by_image, by_text = same.float(), same.T.float()
        by_image = by_image / by_image.sum(dim=1, keepdim=True)
        by_text = by_text / by_text.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, by_image) + F.cross_entropy(logits.T, by_text)) / 2


def equal_captions(captions: Sequence[Hashable], device: torch.device | str | None = None) -> Tensor:
    """Which captions of a batch are the same, (B, B) bool; give strings, or any key that stands for one."""
    numbers: dict[Hashable, int] = {}
    ids = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions], device=device)
    return ids[:, None] == ids[None, :]


@torch.no_grad()
def clamp_logit_scale_(logit_scale: Tensor) -> Tensor:
    """Hold the learned 1 / temperature in [1, 100], in place; call it after every optimiser step."""
    return logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
