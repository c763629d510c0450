"""LoRA (Hu et al. 2021): low-rank differences of a UNet's and its text towers' weights, merged into them.

W + scale * alpha / rank * up @ down, added once, so that painting costs nothing more and no layer is wrapped. Nothing
of a model is changed before all of a file fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_core.fit import named
from clip_core.weights import content_hash
from gen.adapters.file import Adapter, found
from gen.adapters.lora_file import read_factors
from gen.adapters.lora_names import DOWN, PREFIXES, UP, Layer
from gen.checks import finite_float
from gen.families.base import FamilyModel
from gen.weights import ADAPTER

USUAL = "pytorch_lora_weights.safetensors"  # as diffusers names the file


def merge(model: FamilyModel, name: str | Path, scale: float = 1.0) -> Adapter:
    """Add a LoRA's differences to the weights of a model's parts, in place.

    Text towers must be the model's own (`FamilyModel.with_own_texts`). ValueError as of `merge_into`.
    """
    return merge_into(model.parts(), name, scale)


@torch.no_grad()
def merge_into(parts: Mapping[str, Any], name: str | Path, scale: float = 1.0) -> Adapter:
    """Add a LoRA's differences, `scale` times, to the weights of parts by their names, in place.

    ValueError for a file that is of another kind or of another base model; then nothing was changed.
    """
    scale = finite_float("scale", scale, -math.inf)
    path = found("LoRA", name, USUAL, beside=[f"*{ADAPTER}"]).path
    layers = layers_of(parts)
    factors, files = read_factors(str(name), path, layers)
    if other := sorted(" ".join(layer) for layer, each in factors.items() if not each.fits(layers[layer].weight)):
        raise ValueError(f"LoRA '{name}' is of another base model: {named(other)} of another shape here")
    for layer, each in factors.items():
        weight = layers[layer].weight
        weight.copy_(weight.float() + scale * each.difference(weight))
    return Adapter("lora", str(name), content_hash(*files), scale)


@torch.no_grad()
def between(base: nn.Module, other: nn.Module, rank: int) -> dict[str, Tensor]:
    """The nearest LoRA of this rank to what one UNet's layers have beside another's, in peft's layout.

    By the singular values of each difference (Eckart & Young 1936). Norms and biases are left out.
    """
    tensors = {}
    others = layers_of({"unet": other})
    for (part, name), layer in layers_of({"unet": base}).items():
        difference = (others[part, name].weight.float() - layer.weight.float()).flatten(1)
        up, sizes, down = torch.linalg.svd(difference, full_matrices=False)
        root, beside = sizes[:rank].sqrt(), layer.weight.shape[2:]
        tensors[f"{part}.{name}{DOWN[0]}"] = (root[:, None] * down[:rank]).reshape(-1, layer.weight.shape[1], *beside)
        tensors[f"{part}.{name}{UP[0]}"] = (up[:, :rank] * root).reshape(len(up), -1, *[1] * len(beside))
    return {key: factor.contiguous() for key, factor in tensors.items()}


def layers_of(parts: Mapping[str, Any]) -> dict[Layer, nn.Linear | nn.Conv2d]:
    """What a LoRA may be of: linear layers and convolutions of the parts it can name."""
    return {
        (part, name): module
        for part in PREFIXES
        if isinstance(parts.get(part), nn.Module)
        for name, module in parts[part].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
