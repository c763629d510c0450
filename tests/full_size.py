"""Stable Diffusion 1.5, 2.1, XL and its refiner as published: configurations, and parts without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig

from gen.model_index import part_class
from tests.tiny import tiny_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
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

# each with its stock class, what its parts are made of, how many numbers their files hold, and how it paints
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
