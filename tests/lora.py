"""LoRAs of random factors, written in every layout that files have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gen import TextToImage
from gen.adapters.lora import layers_of
from gen.adapters.lora_names import Layer, stability_names
from gen.families import FamilyModel

RANK, ALPHA, SCALE = 3, 6.0, 0.7
Pairs = dict[Layer, tuple[Tensor, Tensor]]
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def pairs_of(model: FamilyModel, *, only: str = "") -> Pairs:
    """Random factors of attentions, projections, convolutions and a timestep layer, down and up."""
    rng = torch.Generator().manual_seed(3)
    chosen = ("attn1.to_q", "attn2.to_v", "attn2.to_out.0", "q_proj", "out_proj")
    chosen += ("proj_in", "conv1", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "fc1", "ff.net.2")
    pairs = {}
    for layer, module in layers_of(model.parts()).items():
        if layer[1].endswith(chosen) and only in layer[1]:
            shape, tail = module.weight.shape, [1] * (module.weight.ndim - 2)
            down = torch.randn(RANK, *shape[1:], generator=rng) * 0.3
            pairs[layer] = (down, torch.randn(shape[0], RANK, *tail, generator=rng) * 0.3)
    assert len(pairs) >= 4
    return pairs


def full(layer: Layer) -> str:
    """A layer's name as files have it, which transformers 5 shortens for a tower without projection."""
    part, name = layer
    return f"text_model.{name.removeprefix('text_model.')}" if part.startswith("text") else name


def in_peft(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers writes it; the alpha is in what the file says of itself."""
    weights = {}
    for layer, (down, up) in pairs.items():
        weights |= {f"{layer[0]}.{full(layer)}.lora_A.weight": down, f"{layer[0]}.{full(layer)}.lora_B.weight": up}
    config: dict[str, Any] = {}
    for part in dict.fromkeys(part for part, _ in pairs):
        names = [name.removeprefix("text_model.") for of, name in pairs if of == part]
        config |= {f"{part}.r": RANK, f"{part}.lora_alpha": ALPHA, f"{part}.target_modules": names}
    return weights, {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def in_kohya(pairs: Pairs, name_of: Callable[[Layer], str] = full) -> tuple[dict[str, Tensor], dict[str, str]]:
    weights = {}
    for layer, (down, up) in pairs.items():
        stem = KOHYA[layer[0]] + name_of(layer).replace(".", "_")
        weights |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(ALPHA),
        }
    return weights, {}


def in_stability(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As kohya's trainer names XL's layers: the second tower's number is 2, so the first one's is 1."""

    def name_of(layer: Layer) -> str:
        return [full(layer), *stability_names(layer[1], 1)][-1] if layer[0] == "unet" else full(layer)

    weights, metadata = in_kohya(pairs, name_of)
    return {key.replace("lora_te_", "lora_te1_"): value for key, value in weights.items()}, metadata


def in_processors(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers wrote it in 2023; nothing says an alpha, so it is the rank."""
    weights = {}
    for layer, (down, up) in pairs.items():
        name, at = full(layer), "lora"
        for attention in ("attn1", "attn2"):
            if f".{attention}.to_" in name:
                name = name.replace(f"{attention}.to_", f"{attention}.processor.to_").replace("to_out.0", "to_out")
                at = "_lora"
        if layer[0] != "unet":
            at = "lora_linear_layer"
        stem = f"{layer[0]}.{name}{'' if at.startswith('_') else '.'}{at}"
        weights |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return weights, {}


LAYOUTS = {"peft": in_peft, "kohya": in_kohya, "stability": in_stability, "processors": in_processors}


def write(path: Path, layout: str, pairs: Pairs) -> Path:
    weights, metadata = LAYOUTS[layout](pairs)
    save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata=metadata or None)
    return path


def loaded(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


def weights_of(model: TextToImage) -> dict[Layer, Tensor]:
    parts = {name: part for name, part in model.model.parts().items() if isinstance(part, nn.Module)}
    return {(name, key): value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}
