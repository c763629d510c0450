"""Networks for drafts on disk: what one was trained for, beside a UNet or beside a LoRA of the model's own."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from clip_core.weights import read_json
from gen.adapters import lora
from gen.drafter import Drafter
from gen.part import load_part, save_part, write_json

FOLDER = "draft_unet"  # in a model's folder; stock diffusers does not look there
DRAFT_CONFIG = "draft.json"  # in that folder: what it was trained for


def read(folder: Path, base: UNet2DConditionModel) -> Drafter:
    """From a folder as `save` or `save_low_rank` writes it, where `base` is the model's own UNet.

    ValueError where a file is missing or damaged, or of another model.
    """
    path = folder / DRAFT_CONFIG
    config = read_json(path)
    steps, scale = config.get("num_inference_steps"), config.get("guidance_scale")
    if not isinstance(steps, int) or steps < 1 or not isinstance(scale, int | float) or not scale >= 1:
        raise ValueError(
            f"model file '{path}' is damaged (num_inference_steps {steps!r}, guidance_scale {scale!r}); "
            "give 1 or more of each"
        )
    if is_low_rank(folder):
        unet = copy.deepcopy(base)
        lora.merge_into({"unet": unet}, folder / lora.USUAL)
    else:
        unet = load_part(UNet2DConditionModel, folder, base.device, base.dtype)
    return Drafter(unet, steps, float(scale))


def is_low_rank(folder: Path) -> bool:
    """Whether `save_low_rank` wrote a folder."""
    return (folder / lora.USUAL).is_file()


def save(drafter: Drafter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers UNet folder, and beside it what it was trained for; `dtype` None: as the weights are.

    One that was read as a LoRA is a whole UNet from here on, for it was merged.
    """
    save_part(drafter.unet, folder, dtype)
    (folder / lora.USUAL).unlink(missing_ok=True)  # of one that lay there before
    tell(drafter, folder)


def save_low_rank(drafter: Drafter, base: UNet2DConditionModel, rank: int, folder: Path) -> None:
    """Write its difference to a model's own UNet as a LoRA in float16, and beside it what it was trained for."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = lora.between(base, drafter.unet, rank)
    save_file({key: factor.half() for key, factor in factors.items()}, folder / lora.USUAL, metadata={"format": "pt"})
    tell(drafter, folder)


def tell(drafter: Drafter, folder: Path) -> None:
    """Write what a network was trained for."""
    config = {"num_inference_steps": drafter.num_inference_steps, "guidance_scale": drafter.guidance_scale}
    write_json(folder / DRAFT_CONFIG, config)
