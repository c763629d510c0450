"""The names that a LoRA's file has for a layer and its factors: diffusers', peft's, kohya's and Stability's.

A layer goes by many names on disk; `aliases` writes them all down, and a file's keys are looked up among them. These
are strings alone: no weights and no file are known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

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


def split(key: str) -> tuple[str, str]:
    """A key's layer, and which of its tensors it is; the latter is empty where it is none of ours."""
    for role, endings in ROLES.items():
        for ending in endings:
            if key.endswith(ending):
                return key.removesuffix(ending), role
    return key, ""


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
AROUND = {  # what lies around the blocks
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
    if layer in AROUND:
        yield AROUND[layer]
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
