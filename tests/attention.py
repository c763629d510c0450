"""Layers and UNets of every kind that diffusers' attention is in, tiny and all of it drawn, and what they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
from torch import Tensor

from gen.attention.network import attentions, reading
from gen.conditioning import Alike, Distinct

ON_CPU = ["auto", "sdpa", "flash", "math"]
ROWS, HEADS, CHANNELS, SIDE, LENGTH = 3, 2, 32, 4, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: Any) -> Any:
    """All parameters drawn, norms and biases included, so that none can be left out unseen."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed) * (0.4 if parameter.ndim > 1 else 0.7))
    return module.eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


ADDED: dict[str, Any] = {"added_kv_proj_dim": 12, "norm_num_groups": 4, "bias": True, "upcast_softmax": True}
ADDED |= {"cross_attention_dim": CHANNELS}
LAYERS: dict[str, dict[str, Any]] = {
    "self": {},
    "cross": {"cross_attention_dim": 12},
    "upcast": {"cross_attention_dim": 12, "upcast_attention": True, "upcast_softmax": True},
    "unscaled": {"scale_qk": False},
    "norm_q and norm_k": {"cross_attention_dim": 12, "qk_norm": "layer_norm"},
    "layer norm of the text": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
    "group norm of the text": {
        "cross_attention_dim": 12,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
    "spatial": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7, "bias": True},
    "spatial norm": {"norm_num_groups": 4, "spatial_norm_dim": 6, "residual_connection": True},
    "added": ADDED,
    "added alone": ADDED | {"only_cross_attention": True},
    "added, normed": ADDED | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
}


def layer_of(kind: str) -> Attention:
    options = LAYERS[kind]
    processor = AttnAddedKVProcessor2_0() if "added_kv_proj_dim" in options else None
    return randomised(Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS, processor=processor, **options))


def arguments(kind: str) -> dict[str, Any]:
    options, spatial = LAYERS[kind], kind.startswith(("spatial", "added"))
    given: dict[str, Any] = {"hidden_states": drawn(ROWS, CHANNELS, SIDE, SIDE)}
    if not spatial:
        given["hidden_states"] = given["hidden_states"].flatten(2).mT
    if "cross_attention_dim" in options:
        given["encoder_hidden_states"] = drawn(ROWS, LENGTH, 12, seed=1)
    if "spatial_norm_dim" in options:
        given["temb"] = drawn(ROWS, 6, SIDE, SIDE, seed=2)
    return given


COMMON: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16)}
COMMON |= {"layers_per_block": 1, "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4}
CROSS: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
CROSS |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SIMPLE: dict[str, Any] = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
SIMPLE |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
SIMPLE |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift"}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": CROSS,
    "SD 2": CROSS | {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)},
    "SD XL": CROSS
    | {"use_linear_projection": True, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"}
    | {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 + 6 * 4},
    "text in every attention": CROSS | {"only_cross_attention": True},
    "attention without text": CROSS | {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
    "Karlo": SIMPLE | {"class_embed_type": "identity"},
    "Karlo, text alone": SIMPLE | {"mid_block_only_cross_attention": True, "only_cross_attention": True},
    "Kandinsky 2.2": SIMPLE
    | {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 10},
}


def unet_of(kind: str) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**(COMMON | UNETS[kind])).eval()
    with torch.no_grad():
        for layer in attentions(unet):
            randomised(layer)  # or attention hardly shows
    return unet


def inputs(kind: str, of: Sequence[int]) -> dict[str, Any]:
    """Evaluation m of text of[m], every row with an x and a timestep of its own."""
    rows = len(of)
    states = drawn(max(of) + 1, LENGTH, 12, seed=5)[list(of)]
    given: dict[str, Any] = {"sample": drawn(rows, 4, 8, 8), "timestep": torch.arange(rows) * 100}
    given |= {"encoder_hidden_states": states}
    if kind == "SD XL":
        given["added_cond_kwargs"] = {"text_embeds": drawn(rows, 6, seed=6), "time_ids": drawn(rows, 6, seed=7)}
    if kind == "Karlo":
        given["class_labels"] = drawn(rows, 32, seed=8)
    if kind == "Kandinsky 2.2":
        given["added_cond_kwargs"] = {"image_embeds": drawn(max(of) + 1, 10, seed=9)[list(of)]}
    return given


def painted(
    unet: UNet2DConditionModel,
    given: dict[str, Any],
    texts: Distinct[Tensor] | None = None,
    alike: Alike | None = None,
) -> Tensor:
    kwargs: dict[str, Any] | None = None
    if texts is not None:
        states = unet.process_encoder_hidden_states(given["encoder_hidden_states"], given.get("added_cond_kwargs"))
        of_text = {id(text): states[texts.of.index(place)] for place, text in enumerate(texts.unique)}
        kwargs = reading(unet, texts, lambda new: torch.stack([of_text[id(text)] for text in new]))
        kwargs = kwargs and (kwargs if alike is None else {**kwargs, "alike": alike})
    return unet(**given, cross_attention_kwargs=kwargs).sample


def texts_of(of: Sequence[int]) -> Distinct[Tensor]:
    """What evaluations read, in the words of a call's conditions; the tokens only stand for the texts here."""
    tokens = [torch.empty(0) for _ in range(max(of) + 1)]
    return Distinct.among([tokens[text] for text in of])
