"""LoRA (Hu et al. 2021): low-rank differences of a UNet's and its text towers' weights, merged into them.

W + scale * alpha / rank * up @ down, added once, so that painting costs nothing more and no layer is wrapped. A layer
goes by many names on disk; `aliases` writes them all down, and a file's keys are looked up among them. Nothing of a
model is changed before all of a file fits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_core.fit import named
from clip_core.weights import content_hash, read_json
from gen.adapters.file import Adapter, Weights, found, read
from gen.checks import is_number, real
from gen.families.painter import Painter
from gen.weights import ADAPTER

USUAL = "pytorch_lora_weights.safetensors"  # as diffusers names the file
SAID = "lora_adapter_metadata"  # where diffusers' files keep peft's configuration
PEFT = "base_model.model."  # stands before the names of peft's own files, which are of one part and do not say which
# What peft's own files were trained beside the weights of the base model, and not beside weights changed at the start.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# Parts by what stands before their layers' names: peft's and diffusers' with a dot, kohya's trainer's without.
PREFIXES = {
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")
UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
FIRST_DOWN, FIRST_UP = "_lora.down.weight", "_lora.up.weight"  # diffusers of 2023: ...attn1.processor.to_q_lora.down
ROLES = {"down": (*DOWN, FIRST_DOWN), "up": (*UP, FIRST_UP), "alpha": (".alpha",)}

Layer = tuple[str, str]  # part and module


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


def merge(model: Painter, name: str | Path, scale: float = 1.0) -> Adapter:
    """Add a LoRA's differences to the weights of a model's parts, in place.

    Text towers must be the model's own (`Painter.with_own_texts`). ValueError as of `merge_into`.
    """
    return merge_into(model.parts(), name, scale)


@torch.no_grad()
def merge_into(parts: Mapping[str, Any], name: str | Path, scale: float = 1.0) -> Adapter:
    """Add a LoRA's differences, `scale` times, to the weights of parts by their names, in place.

    ValueError for a file that is of another kind or of another base model; then nothing was changed.
    """
    scale = real("scale", scale, -math.inf)
    path = found("LoRA", name, USUAL, beside=[f"*{ADAPTER}"]).path
    layers, weights, files = layers_of(parts), read(path), [path]
    if any(key.startswith(PEFT) for key in weights.tensors):
        files.append(path.with_name(ADAPTER))
        weights = of_part(str(name), weights, files[-1], layers)
    factors = factors_of(str(name), weights, layers)
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
    told = {}
    others = layers_of({"unet": other})
    for (part, name), layer in layers_of({"unet": base}).items():
        difference = (others[part, name].weight.float() - layer.weight.float()).flatten(1)
        up, sizes, down = torch.linalg.svd(difference, full_matrices=False)
        root, beside = sizes[:rank].sqrt(), layer.weight.shape[2:]
        told[f"{part}.{name}{DOWN[0]}"] = (root[:, None] * down[:rank]).reshape(-1, layer.weight.shape[1], *beside)
        told[f"{part}.{name}{UP[0]}"] = (up[:, :rank] * root).reshape(len(up), -1, *[1] * len(beside))
    return {key: factor.contiguous() for key, factor in told.items()}


def of_part(name: str, weights: Weights, beside: Path, layers: Mapping[Layer, nn.Linear | nn.Conv2d]) -> Weights:
    """A file of peft's own as diffusers writes it: with the part that it is of, and with its configuration."""
    if not beside.is_file():
        raise ValueError(f"LoRA '{name}' is peft's own and has no {ADAPTER} beside it; give the folder that peft saved")
    said = read_json(beside)
    if (kind := said.get("peft_type")) != "LORA":
        raise ValueError(f"LoRA '{name}' is of peft's kind {kind!r}, which is not read; give a LoRA")
    if (start := said.get("init_lora_weights")) not in STARTS:
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
    return Weights(tensors, {SAID: json.dumps({f"{part}.{key}": value for key, value in said.items()})})


def layers_of(parts: Mapping[str, Any]) -> dict[Layer, nn.Linear | nn.Conv2d]:
    """What a LoRA may be of: linear layers and convolutions of the parts it can name."""
    return {
        (part, name): module
        for part in PREFIXES
        if isinstance(parts.get(part), nn.Module)
        for name, module in parts[part].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def factors_of(name: str, weights: Weights, layers: Mapping[Layer, nn.Module]) -> dict[Layer, Factors]:
    """What a file says of each layer; ValueError where a key is of no layer, or half of a pair is missing."""
    said, known = configuration(name, weights.metadata), by_name(layers)
    told: dict[Layer, dict[str, Tensor]] = {}
    unread, unknown = [], []
    for key, tensor in weights.tensors.items():
        stem, role = split(key)
        if not role:
            unread.append(key)
        elif (alias := flat(stem)) in known:
            told.setdefault(known[alias], {})[role] = tensor
        else:
            unknown.append(key)
    if unread:
        raise ValueError(f"LoRA '{name}' cannot be read: {named(sorted(unread))} neither up, down nor alpha")
    if unknown:
        raise ValueError(f"LoRA '{name}' is of another base model: {named(sorted(unknown))} of no layer here")
    if lonely := sorted(" ".join(layer) for layer, each in told.items() if not {"down", "up"} <= each.keys()):
        raise ValueError(f"LoRA '{name}' is damaged: {named(lonely)} without up or down")
    if not told:
        raise ValueError(f"LoRA '{name}' holds nothing")
    for layer, each in told.items():
        if wrong := next((role for role, tensor in each.items() if not is_shaped(role, tensor)), None):
            wanted = "number" if wrong == "alpha" else "matrix"
            what = f"{wrong} of {' '.join(layer)} has shape {tuple(each[wrong].shape)}, which is no {wanted}"
            raise ValueError(f"LoRA '{name}' is damaged: {what}")
    return {layer: Factors(each["down"], each["up"], weight_of(layer, each, said)) for layer, each in told.items()}


def is_shaped(role: str, tensor: Tensor) -> bool:
    """Whether it can be what it is called: a matrix of some rank, or one number."""
    return tensor.numel() == 1 if role == "alpha" else tensor.ndim >= 2 and tensor.numel() > 0


def split(key: str) -> tuple[str, str]:
    """A key's layer, and which of its tensors it is; the latter is empty where it is none of ours."""
    for role, endings in ROLES.items():
        for ending in endings:
            if key.endswith(ending):
                return key.removesuffix(ending), role
    return key, ""


def configuration(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of diffusers says of its ranks and alphas; empty where it says nothing."""
    try:
        said = json.loads(metadata.get(SAID, "{}"))
    except ValueError:
        raise ValueError(f"LoRA '{name}' is damaged: its {SAID} is no JSON") from None
    if not isinstance(said, dict):
        raise ValueError(f"LoRA '{name}' is damaged: its {SAID} is no object")
    for key, value in said.items():
        match key.rpartition(".")[2]:
            case "use_dora" if value:
                raise ValueError(f"LoRA '{name}' is a DoRA, which is not read; give a plain LoRA")
            case "lora_alpha" if not is_number(value, -math.inf):
                raise ValueError(f"LoRA '{name}' is damaged: its {key} is {value!r}, which is no number")
            case "alpha_pattern" if not is_pattern(value):
                raise ValueError(f"LoRA '{name}' is damaged: its {key} is {value!r}, and not numbers by layer")
    return said


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


def weight_of(layer: Layer, told: Mapping[str, Tensor], said: Mapping[str, Any]) -> float:
    """Its alpha / rank, or alpha / sqrt(rank) of a rank-stabilised one; alpha is the rank where nobody says it."""
    part, name = layer
    rank = len(told["down"])
    if "alpha" in told:
        return float(told["alpha"]) / rank
    patterns = said.get(f"{part}.alpha_pattern") or {}
    names = list(text_names(name)) if part.startswith("text") else [name]
    own = (alpha for ends, alpha in patterns.items() if any(re.fullmatch(rf"(.*\.)?({ends})", each) for each in names))
    alpha = next(own, said.get(f"{part}.lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if said.get(f"{part}.use_rslora") else rank)


# --- the names of a layer ----------------------------------------------------------------------------------------


def by_name(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Layers by every name that files have for them."""
    layers = list(layers)
    blocks = blocks_of(layers)
    return {alias: layer for layer in layers for alias in aliases(*layer, blocks)}


def flat(name: str) -> str:
    """A name with a line where it has a dot, as kohya's trainer writes it."""
    return name.replace(".", "_")


def aliases(part: str, layer: str, blocks: int) -> Iterator[str]:
    """Every name that files have for a layer of a part, with a line where they have a dot."""
    for name in text_names(layer) if part.startswith("text") else unet_names(layer, blocks):
        yield from (flat(f"{prefix}{name}") for prefix in PREFIXES[part])
        if part == "unet":
            yield flat(name)  # diffusers' first files were of a UNet alone and had no prefix


def unet_names(layer: str, blocks: int) -> Iterator[str]:
    """Names of a UNet's layer: as here, under its attention processor, and as Stability's code counts blocks."""
    yield layer
    if found := re.fullmatch(r"(.*\.attn\d)\.(to_[qkv]|to_out)(\.0)?", layer):
        yield f"{found[1]}.processor.{found[2]}"
    yield from stability_names(layer, blocks)


def text_names(layer: str) -> Iterator[str]:
    """Names of a text tower's layer: transformers 5 leaves `text_model.` out for a tower without projection."""
    bare = layer.removeprefix("text_model.")
    for name in (bare, f"text_model.{bare}"):
        yield name
        if found := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name):
            yield f"{found[1]}.to_{found[2]}"


RESNET = {  # of a residual block: diffusers' names, and Stability's
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {  # what lies around the blocks
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def stability_names(layer: str, blocks: int) -> Iterator[str]:
    """A UNet layer's names in Stability's own code, which counts all blocks of a side in one row; none: it has none.

    `blocks` are the residual blocks of a level on the way down (layers_per_block).
    """
    if layer in OUTSIDE:
        yield OUTSIDE[layer]
    if not (found := re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", layer)):
        return
    side, level, kind, place, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    first = level * (blocks + 1)
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    within = 1 if kind == "attentions" else 0
    match side, kind:
        case "down", "downsamplers":
            yield f"input_blocks.{first + blocks + 1}.0.op"
        case "down", _:
            yield f"input_blocks.{first + place + 1}.{within}.{rest}"
        case "mid", _:
            yield f"middle_block.{within or 2 * place}.{rest}"
        case _, "upsamplers":  # behind a residual block, and an attention where the level has one
            yield from (f"output_blocks.{first + blocks}.{behind}.conv" for behind in (1, 2))
        case _:
            yield f"output_blocks.{first + place}.{within}.{rest}"


def blocks_of(layers: Iterable[Layer]) -> int:
    """The residual blocks of the UNet's first level; 0 where there is no UNet."""
    first = {
        name.split(".")[3] for part, name in layers if part == "unet" and name.startswith("down_blocks.0.resnets.")
    }
    return len(first)
