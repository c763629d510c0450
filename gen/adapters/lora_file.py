"""What a LoRA's file says of each layer: its factors, and alpha / rank, in whatever layout it was written.

A file that is of another kind, damaged or of no layer here is a ValueError; nothing is merged here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_core.fit import named
from clip_core.weights import read_json
from gen.adapters.file import AdapterWeights, read
from gen.adapters.lora_names import DOWN, PREFIXES, Layer, by_name, flat, split, text_names
from gen.checks import is_number
from gen.weights import ADAPTER

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers' files keep peft's configuration
PEFT = "base_model.model."  # stands before the names of peft's own files, which are of one part and do not say which
# What peft's own files were trained beside the weights of the base model, and not beside weights changed at the start.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class Factors:
    """What a file says of one layer."""

    down: Tensor  # (rank, in), or of a convolution (rank, in, kh, kw)
    up: Tensor  # (out, rank), or of a convolution (out, rank, 1, 1)
    weight: float  # alpha / rank

    def fits(self, layer: Tensor) -> bool:
        """Whether it is of a layer of this shape."""
        down, up = self.down.flatten(1), self.up.flatten(1)
        return len(down) == up.shape[1] and len(up) == len(layer) and down.shape[1] == layer[0].numel()

    def difference(self, layer: Tensor) -> Tensor:
        """The weight times up @ down in float32, as the layer's weight lies."""
        up, down = (each.flatten(1).to(layer.device, torch.float32) for each in (self.up, self.down))
        return (self.weight * (up @ down)).reshape(layer.shape)


def read_factors(
    name: str, path: Path, layers: Mapping[Layer, nn.Linear | nn.Conv2d]
) -> tuple[dict[Layer, Factors], list[Path]]:
    """What a LoRA's file says of each layer, and all the files that say it."""
    weights, files = read(path), [path]
    if any(key.startswith(PEFT) for key in weights.tensors):
        files.append(path.with_name(ADAPTER))
        weights = of_part(name, weights, files[-1], layers)
    return factors_of(name, weights, layers), files


def of_part(
    name: str, weights: AdapterWeights, beside: Path, layers: Mapping[Layer, nn.Linear | nn.Conv2d]
) -> AdapterWeights:
    """A file of peft's own as diffusers writes it: with the part that it is of, and with its configuration."""
    if not beside.is_file():
        raise ValueError(f"LoRA '{name}' is peft's own and has no {ADAPTER} beside it; give the folder that peft saved")
    config = read_json(beside)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"LoRA '{name}' is of peft's kind {kind!r}, which is not read; give a LoRA")
    if (start := config.get("init_lora_weights")) not in STARTS:
        raise ValueError(f"LoRA '{name}' started from {start!r}, which changes the base model; save it as a plain LoRA")
    known = by_name(layers)
    downs = {key.removesuffix(DOWN[0]): tensor for key, tensor in weights.tensors.items() if key.endswith(DOWN[0])}

    def fitting(part: str) -> int:
        """How many of its layers a part has, as wide as here."""
        found = {stem: known.get(flat(stem.replace(PEFT, f"{part}.", 1))) for stem in downs}
        return sum(
            layer is not None and downs[stem].shape[1:].numel() == layers[layer].weight[0].numel()
            for stem, layer in found.items()
        )

    part = max(PREFIXES, key=fitting)
    tensors = {key.replace(PEFT, f"{part}.", 1): tensor for key, tensor in weights.tensors.items()}
    return AdapterWeights(
        tensors, {PEFT_METADATA: json.dumps({f"{part}.{key}": value for key, value in config.items()})}
    )


def factors_of(name: str, weights: AdapterWeights, layers: Mapping[Layer, nn.Module]) -> dict[Layer, Factors]:
    """What a file says of each layer; ValueError where a key is of no layer, or half of a pair is missing."""
    config, known = configuration(name, weights.metadata), by_name(layers)
    factors: dict[Layer, dict[str, Tensor]] = {}
    unread, unknown = [], []
    for key, tensor in weights.tensors.items():
        stem, role = split(key)
        if not role:
            unread.append(key)
        elif (alias := flat(stem)) in known:
            factors.setdefault(known[alias], {})[role] = tensor
        else:
            unknown.append(key)
    if unread:
        raise ValueError(f"LoRA '{name}' cannot be read: {named(sorted(unread))} neither up, down nor alpha")
    if unknown:
        raise ValueError(f"LoRA '{name}' is of another base model: {named(sorted(unknown))} of no layer here")
    if lonely := sorted(" ".join(layer) for layer, each in factors.items() if not {"down", "up"} <= each.keys()):
        raise ValueError(f"LoRA '{name}' is damaged: {named(lonely)} without up or down")
    if not factors:
        raise ValueError(f"LoRA '{name}' holds nothing")
    for layer, each in factors.items():
        if wrong := next((role for role, tensor in each.items() if not is_shaped(role, tensor)), None):
            wanted = "number" if wrong == "alpha" else "matrix"
            what = f"{wrong} of {' '.join(layer)} has shape {tuple(each[wrong].shape)}, which is no {wanted}"
            raise ValueError(f"LoRA '{name}' is damaged: {what}")
    return {layer: Factors(each["down"], each["up"], weight_of(layer, each, config)) for layer, each in factors.items()}


def is_shaped(role: str, tensor: Tensor) -> bool:
    """Whether it can be what it is called: a matrix of some rank, or one number."""
    return tensor.numel() == 1 if role == "alpha" else tensor.ndim >= 2 and tensor.numel() > 0


def configuration(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of diffusers says of its ranks and alphas; empty where it says nothing."""
    try:
        config = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except ValueError:
        raise ValueError(f"LoRA '{name}' is damaged: its {PEFT_METADATA} is no JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"LoRA '{name}' is damaged: its {PEFT_METADATA} is no object")
    for key, value in config.items():
        match key.rpartition(".")[2]:
            case "use_dora" if value:
                raise ValueError(f"LoRA '{name}' is a DoRA, which is not read; give a plain LoRA")
            case "lora_alpha" if not is_number(value, -math.inf):
                raise ValueError(f"LoRA '{name}' is damaged: its {key} is {value!r}, which is no number")
            case "alpha_pattern" if not is_pattern(value):
                raise ValueError(f"LoRA '{name}' is damaged: its {key} is {value!r}, and not numbers by layer")
    return config


def is_pattern(value: object) -> bool:
    """Whether it is numbers by patterns of layers' names, or nothing."""
    if value is None:
        return True
    try:
        return isinstance(value, dict) and all(
            re.compile(key) and is_number(each, -math.inf) for key, each in value.items()
        )
    except re.error:
        return False


def weight_of(layer: Layer, factors: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    """Its alpha / rank, or alpha / sqrt(rank) of a rank-stabilised one; alpha is the rank where nobody says it."""
    part, name = layer
    rank = len(factors["down"])
    if "alpha" in factors:
        return float(factors["alpha"]) / rank
    patterns = config.get(f"{part}.alpha_pattern") or {}
    names = list(text_names(name)) if part.startswith("text") else [name]
    own = (alpha for ends, alpha in patterns.items() if any(re.fullmatch(rf"(.*\.)?({ends})", each) for each in names))
    alpha = next(own, config.get(f"{part}.lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get(f"{part}.use_rslora") else rank)
