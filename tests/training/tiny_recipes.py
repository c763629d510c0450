"""Recipes of tiny networks on a few Shapes, for every trainable part, and the files they are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

WIDTH = 16  # D and E

TRAIN: dict[str, Any] = {
    "steps": 2,
    "batch_size": 8,
    "learning_rate": 1.0e-3,
    "warmup_steps": 1,
    "log_every": 1,
    "save_every": 100,
    "sheet_every": 100,
}
TOWER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
VAE = {
    "block_out_channels": [4, 4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SCHEDULER = {"timestep_spacing": "trailing", "clip_sample": False}


def recipes(data: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Every part's recipe, each reading the models that the ones before it write under `out`."""
    clip, vae = str(out / "clip" / "model"), str(out / "vae" / "model")
    own: dict[str, dict[str, Any]] = {
        "clip": {
            "vocab_size": 600,
            "projection_dim": WIDTH,
            "text": TOWER,
            "vision": {**TOWER, "patch_size": 16},
        },
        "vae": {"network": VAE},
        "prior": {
            "clip": clip,
            "network": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
            "scheduler": {**SCHEDULER, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        },
        "decoder": {
            "clip": clip,
            "vae": vae,
            "network": UNET,
            "scheduler": {**SCHEDULER, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
        },
    }
    shared = {"data": str(data), "resolution": 64, "train": TRAIN}
    return {part: {"task": part, "out": str(out / part), **shared, **keys} for part, keys in own.items()} | {
        "bundle": {
            "task": "bundle",
            "data": str(data),
            "out": str(out / "bundled"),
            **{part: str(out / part / "model") for part in own},
            "knows": "a few Shapes, and those badly",
            "defaults": {"num_inference_steps": 2, "prior_num_inference_steps": 2, "guidance_scale": 2.0},
        },
        "draft": {
            "task": "draft",
            "data": str(data),
            "out": str(out / "draft"),
            "model": str(out / "bundled"),
            "num_inference_steps": 2,
            "teacher_steps": 4,
            "train": TRAIN,
        },
    }


def written(recipe: dict[str, Any], folder: Path) -> Path:
    """The recipe as a YAML file in the folder."""
    path = folder / f"{recipe['task']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
