"""Stable unCLIP by diffusers' own pipelines: the one that is given embeddings, and the noise of our seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from samplers.noise import noise
from tests.tiny import WIDTH


def with_our_noise(pipeline: Any, seeds: list[int]) -> Any:
    """The pipeline, its image noising fed our noise: one draw per picture, whoever is beside it."""
    theirs = partial(type(pipeline).noise_image_embeddings, pipeline)  # its own, however often this is done

    def noise_image_embeddings(image_embeds: Tensor, noise_level: int, **_: Any) -> Tensor:
        return theirs(image_embeds, noise_level, noise=noise(seeds, "image_noise", 0, (WIDTH,)))

    pipeline.noise_image_embeddings = noise_image_embeddings
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def img2img(folder: Path) -> StableUnCLIPImg2ImgPipeline:
    """The pipeline that is given embeddings, of the parts of a folder that has a prior."""
    whole = StableUnCLIPPipeline.from_pretrained(folder)
    names = ["image_normalizer", "image_noising_scheduler", "tokenizer", "text_encoder", "unet"]
    names += ["scheduler", "vae"]
    parts = {name: getattr(whole, name) for name in names}
    # with image_embeds given, stock asks its image encoder for nothing but the type of its weights
    few = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny = CLIPVisionConfig(**few, projection_dim=WIDTH)
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=CLIPVisionModelWithProjection(tiny), **parts
    )
