"""A checkpoint family beside stock diffusers' pipeline: one start, the same latents and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen import TextToImage
from gen.picture import largest_difference
from samplers.noise import SEEDS, STAGES, noise

SHORT, LONG = "a star", "a small red circle above a large blue square left of a green star on black"
PROMPTS = [SHORT, LONG]
SEED = 11
FEW: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0}  # asked of both
LATENTS, EIGHT_BIT_LEVEL = 1e-4, 1  # what may differ: of the largest latent, and 8-bit levels of a picture


def stock_of(kind: Any, folder: Path) -> Any:
    """A folder's stock pipeline."""
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start(num_prompts: int, n: int, size: tuple[int, int] = (8, 8)) -> Tensor:
    """The noise our seeds stand for, in drawing order."""
    return noise([SEED + k for _ in range(num_prompts) for k in range(n)], "decoder", 0, (4, *size))


def draws(stage: str, seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each picture, of the numbers that our seeds stand for."""
    return [torch.Generator().manual_seed((seed + STAGES[stage]) % SEEDS) for seed in seeds]


def apart(ours: Any, theirs: Tensor) -> float:
    """The largest difference, of the largest latent."""
    assert isinstance(ours, Tensor) and ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_same(model: TextToImage, stock: Any, prompts: list[str], n: int, **asked: Any) -> None:
    """Final latents and the pictures on file, of one start."""
    asked = {"num_images_per_prompt": n, "num_inference_steps": 5} | asked
    latents = start(len(prompts), n)
    theirs = stock(prompts, output_type="latent", latents=latents, **asked).images
    assert apart(model(prompts, output_type="latent", seed=SEED, **asked).images, theirs) <= LATENTS
    theirs = stock(prompts, output_type="pil", latents=latents, **asked).images
    ours = model(prompts, output_type="pil", seed=SEED, **asked).images
    assert len(ours) == len(theirs) == len(prompts) * n
    assert max(largest_difference(a, b) for a, b in zip(ours, theirs, strict=True)) <= EIGHT_BIT_LEVEL


def assert_same_sampled(model: TextToImage, stock: Any, sampler: str | None) -> None:
    """Final latents by a sampler that may draw noise: from one CPU generator for each picture, as we draw it."""
    seeds = [SEED + k for _ in PROMPTS for k in range(2)]
    asked: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 5, "output_type": "latent"}
    # without latents stock draws block 0 as the start, and then a block for each step, as we do
    theirs = stock(PROMPTS, generator=draws("decoder", seeds), **asked).images
    assert apart(model(PROMPTS, seed=SEED, sampler=sampler, **asked).images, theirs) <= LATENTS


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all that a network keeps, by its names."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def edited(path: Path, **change: object) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
