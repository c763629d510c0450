"""Stable Diffusion 1.5, 2.1, XL and its refiner at full size, without memory: every part on the meta device.

The configurations are the published ones. That they are is known from how many numbers the published files hold, and
that we take them, from the stock classes' own keys and shapes going in and coming out, with a call of each network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.weights import read_json
from gen.card import Card
from gen.checkpoint import Parts
from gen.conditioning import Conditions, Table
from gen.families import FAMILIES
from gen.model_index import listed, part_class
from gen.part import unfilled
from gen.request import Request
from gen.resolve import resolve
from gen.scheduler import NoiseLevels
from gen.single_file import CONFIGS
from tests.stock import shapes
from tests.tiny import tiny_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
BLOCKS = {"down_block_types": DOWN, "up_block_types": UP, "block_out_channels": (320, 640, 1280, 1280)}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}

FULL: dict[str, dict[str, Any]] = {
    "1.5": {
        "class": StableDiffusionPipeline,
        "unet": {**BLOCKS, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {**VAE, "sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
        "scheduler": PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        "numbers": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        "paints": (512, "pndm", "eps"),
    },
    "2.1": {
        "class": StableDiffusionPipeline,
        "unet": {
            **BLOCKS,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "vae": {**VAE, "sample_size": 768, "scaling_factor": 0.18215},
        "text_encoder": {**OPEN_CLIP_H, "hidden_act": "gelu"},
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        "numbers": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
        "paints": (768, "ddim", "v"),
    },
    "XL": {
        "class": StableDiffusionXLPipeline,
        "unet": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": {**OPEN_CLIP_G, "hidden_act": "gelu", "projection_dim": 1280},
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        "numbers": {
            "unet": 2_567_463_684,
            "vae": 83_653_863,
            "text_encoder": 123_060_480,
            "text_encoder_2": 694_659_840,
        },
        "paints": (1024, "euler", "eps"),
    },
    "XL refiner": {
        "class": StableDiffusionXLImg2ImgPipeline,
        "unet": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (384, 768, 1536, 1536),
            "transformer_layers_per_block": 4,
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder_2": {**OPEN_CLIP_G, "hidden_act": "gelu", "projection_dim": 1280},
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        # all in one file, the published one has 6,075,981,930 bytes of float16 with its names
        "numbers": {"unet": 2_259_526_660, "vae": 83_653_863, "text_encoder_2": 694_659_840},
        "paints": (1024, "euler", "eps"),
        "options": {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
        "words": {"image": Image.new("RGB", (1024, 1024))},
    },
}


def at_full_size(full: dict[str, Any]) -> dict[str, Any]:
    """Parts by their names; networks of the classes that our loader takes, on the meta device."""
    tokenizer = tiny_tokenizer()  # its words are of no account here, the length is
    tokenizer.model_max_length = 77
    where = Path("model_index.json")
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": part_class("diffusers", "UNet2DConditionModel", where)(**full["unet"]),
            "vae": part_class("diffusers", "AutoencoderKL", where)(**full["vae"]),
            "scheduler": full["scheduler"],
        }
        for tower, name in {"": "CLIPTextModel", "_2": "CLIPTextModelWithProjection"}.items():
            if f"text_encoder{tower}" in full:
                kind = part_class("transformers", name, where)
                parts[f"text_encoder{tower}"] = kind(CLIPTextConfig(**text, **full[f"text_encoder{tower}"]))
                parts[f"tokenizer{tower}"] = tokenizer
    return parts


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_full_size(name: str) -> None:
    full = FULL[name]
    parts = at_full_size(full)
    for part, number in full["numbers"].items():
        assert sum(weight.numel() for weight in parts[part].parameters()) == number, part

    family = FAMILIES[full["class"].__name__]
    options = full.get("options", {})
    model = family.of(Parts(full["class"].__name__, parts, None, Card(), Path(name), options))
    size, sampler, kind = full["paints"]
    settings = model.abilities.defaults
    assert (settings.height, settings.width, settings.sampler) == (size, size, sampler)
    assert model.levels.scaling.prediction_type == kind

    left_out = dict.fromkeys({"tokenizer", "text_encoder"} - parts.keys())
    stock = full["class"](**parts, **left_out, **options, **({} if "XL" in name else UNCHECKED))
    ours = {part: module for part, module in model.parts().items() if isinstance(module, nn.Module)}
    theirs = {part: module for part, module in stock.components.items() if isinstance(module, nn.Module)}
    assert {part: shapes(module) for part, module in ours.items()} == {
        part: shapes(module) for part, module in theirs.items()
    }
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    kinds |= {"text_encoder_2": CLIPTextModelWithProjection}
    assert {part: type(module) for part, module in ours.items()} == {part: kinds[part] for part in ours}
    assert isinstance(model.text.tokenizer, CLIPTokenizer)

    # a prompt and its null through towers, UNet and autoencoder
    (candidate,) = resolve(Request(prompt="a star", seed=0, **full.get("words", {})), model.abilities).candidates
    ((prompt, null),) = model.encode_prompts([candidate], Table())
    assert null is not None and prompt.tokens is not None and null.tokens is not None
    assert prompt.tokens.shape == null.tokens.shape == (77, full["unet"]["cross_attention_dim"])
    x = torch.empty(2, *model.latent_shape(settings), device="meta")
    assert x.shape[1:] == (4, size // 8, size // 8)
    assert model.call(x, torch.empty(2, device="meta"), Conditions((null, prompt))).shape == x.shape
    assert model.decode(x).shape == (2, 3, size, size)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("stable-diffusion-v1-5", "1.5"),
        ("stable-diffusion-2-1", "2.1"),
        ("stable-diffusion-2-1-base", "2.1"),
        ("stable-diffusion-xl-base-1.0", "XL"),
        ("stable-diffusion-xl-refiner-1.0", "XL refiner"),
    ],
)
def test_the_configurations_of_single_files_are_the_published_ones(config: str, name: str) -> None:
    folder = CONFIGS / config
    parts = listed(read_json(folder / "model_index.json"))
    for part, number in FULL[name]["numbers"].items():
        told = read_json(folder / part / "config.json")
        network = unfilled(part_class(*parts[part], folder), told)
        assert sum(weight.numel() for weight in network.parameters()) == number, part
    stock = parts["scheduler"][1]
    levels = NoiseLevels.of(getattr(diffusers, stock).from_pretrained(folder / "scheduler"), config)
    expected = ("pndm", "eps") if config.endswith("base") else FULL[name]["paints"][1:]
    assert (levels.sampler, levels.scaling.prediction_type) == expected
