"""Zero-shot classification: names become texts, texts a classifier's weights (Radford et al. 2021, 3.1).

>>> names = ["circle", "square", "triangle", "star", "heart", "cross"]
>>> weights = class_weights(clip, names, ["a {}", "a large {}"])  # more wordings, a better classifier
>>> accuracy(classify(clip, pixels, weights), labels) > 0.9  # of pictures that show one each
True
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_core.clip import CLIP


@torch.no_grad()
def class_weights(clip: CLIP, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Tensor:
    """One unit vector per class, (K, E): the mean of its templates' unit embeddings (ibid. 3.1.4)."""
    if not names or not templates or not all("{}" in template for template in templates):
        given = f"{len(names)} names and the templates {list(templates)}"
        raise ValueError(f"{given} make no classifier; give some of both, each template with {{}} in it")
    texts = [template.replace("{}", name) for name in names for template in templates]
    embedding = F.normalize(clip.text(texts).embedding.float(), dim=-1)
    return F.normalize(embedding.reshape(len(names), len(templates), -1).mean(dim=1), dim=-1)  # (K, E)


@torch.no_grad()
def classify(clip: CLIP, pixels: Tensor, weights: Tensor) -> Tensor:
    """Probability of each class for each picture, (B, K) float32; pixels (B, 3, H, W) in [0, 1]."""
    image = F.normalize(clip.image(pixels).float(), dim=-1)
    return (clip.logit_scale.float().exp() * image @ weights.T.to(image.device)).softmax(dim=-1)


def accuracy(probabilities: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k most probable classes."""
    if not 1 <= k <= probabilities.shape[1]:
        raise ValueError(f"k is {k}; give 1 to {probabilities.shape[1]}, the number of classes")
    best = probabilities.topk(k, dim=1).indices
    return (best == labels.to(best.device)[:, None]).any(dim=1).float().mean().item()
