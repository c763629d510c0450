"""A tiny diffusers folder written as its authors would have: one file, in the names that diffusers' converters read.

The names are worked out here from diffusers' own, the other way round than the converters go.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
RESBLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_single_file(folder: Path, path: Path, open_clip: bool = False) -> Path:
    """One file of a Stable Diffusion folder; its one tower as CLIP's (1.x) or open_clip's (2.x), of XL one of each.

    The refiner has XL's second alone.
    """
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in unet(folder / "unet").items()}
    weights |= {f"first_stage_model.{name}": tensor for name, tensor in vae(folder / "vae").items()}
    if not (folder / "text_encoder").is_dir():
        weights |= open_clip_tower(folder / "text_encoder_2", "conditioner.embedders.0.model.")
    elif (folder / "text_encoder_2").is_dir():
        weights |= clip_tower(folder / "text_encoder", "conditioner.embedders.0.transformer.text_model.")
        weights |= open_clip_tower(folder / "text_encoder_2", "conditioner.embedders.1.model.")
    elif open_clip:
        weights |= open_clip_tower(folder / "text_encoder", "cond_stage_model.model.")
    else:
        weights |= clip_tower(folder / "text_encoder", "cond_stage_model.transformer.text_model.")
    weights["betas"] = torch.zeros(1000)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def stored(folder: Path) -> tuple[Weights, dict[str, Any]]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path), json.loads((folder / "config.json").read_text())


def replaced(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return name


def unet(folder: Path) -> Weights:
    weights, config = stored(folder)
    step = config["layers_per_block"] + 1

    def ldm(name: str) -> str:
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            kind, number, rest = found[1], int(found[2]), found[3]
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{replaced(rest, RESNET)}"
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", name)
        if not found:
            return replaced(name, OUTSIDE)
        way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        blocks, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
        if kind == "downsamplers":
            return f"{blocks}.{first + block * step + step - 1}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":
            attends = any(each.startswith(f"up_blocks.{block}.attentions") for each in weights)
            return f"{blocks}.{block * step + step - 1}.{1 + attends}.{rest}"
        at = first + block * step + layer
        return f"{blocks}.{at}.0.{replaced(rest, RESNET)}" if kind == "resnets" else f"{blocks}.{at}.1.{rest}"

    return {ldm(name): tensor for name, tensor in weights.items()}


def vae(folder: Path) -> Weights:
    weights, config = stored(folder)
    last = len(config["block_out_channels"]) - 1

    def ldm(name: str) -> str:
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", name)
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        if found := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)", name):
            name = f"{found[1]}mid.attn_1.{replaced(found[2], ATTENTION)}"
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    named = {ldm(name): tensor for name, tensor in weights.items()}
    # its attention was a convolution of one pixel
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in named.items()
    }


def clip_tower(folder: Path, prefix: str) -> Weights:
    weights, config = stored(folder)
    named = {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    return named | {f"{prefix}embeddings.position_ids": torch.arange(config["max_position_embeddings"])[None]}


def open_clip_tower(folder: Path, prefix: str) -> Weights:
    weights, config = stored(folder)
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    width = config["hidden_size"]
    named = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": weights.get("text_projection.weight", torch.zeros(width, width)).T,
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            joined = torch.cat([weights[f"{ours}self_attn.{each}_proj.{kind}"] for each in "qkv"])
            named[f"{theirs}attn.in_proj_{kind}"] = joined
            for one, other in RESBLOCK.items():
                named[f"{theirs}{other}.{kind}"] = weights[f"{ours}{one}.{kind}"]
    return {prefix + name: tensor for name, tensor in named.items()}
