"""Tiny random Karlo folders of the real classes, and stock's pipelines put together from their parts.

Stock cannot load such a folder, neither its own nor a published one, for it does not find the class of text_proj.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.pipeline_unclip_image_variation import UnCLIPImageVariationPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from gen.model_index import part_class
from mended import MendedUnCLIP
from tests.tiny import WIDTH, tiny_prior, tiny_text_config, tiny_tokenizer

SMALL, LARGE = 8, 16  # pixels of the decoder's pictures and of those that are enlarged
CONTEXT = 12  # X of what the decoder reads


def tiny_decoder() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SMALL,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=4,
    ).eval()


def tiny_super_res() -> UNet2DModel:
    return UNet2DModel(
        sample_size=LARGE,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        add_attention=False,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=4,
    ).eval()


def drawn(tower: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A tower with weights that are the same whatever version of transformers made it."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(tower.named_parameters()):
            weight.fill_("norm" in name).add_(torch.randn(weight.shape, generator=rng), alpha=0.05)
    return tower.eval()


def make_tiny_karlo(folder: str | Path, seed: int = 0, prior: bool = True) -> Path:
    """Write a tiny random Karlo, or the one for variations of pictures, by diffusers; a seed fixes the model."""
    folder, tokenizer = Path(folder), tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        # towers first: how much a new one takes of torch's generator is a matter of transformers' version
        text_encoder = drawn(CLIPTextModelWithProjection(CLIPTextConfig(**tiny_text_config(tokenizer))), seed)
        torch.manual_seed(seed)
        text_proj = UnCLIPTextProjModel(
            clip_embeddings_dim=WIDTH, time_embed_dim=4 * 8, cross_attention_dim=CONTEXT
        ).eval()
        with torch.no_grad():
            text_proj.learned_classifier_free_guidance_embeddings.normal_()  # zeros by default
        parts: dict[str, Any] = {
            "decoder": tiny_decoder(),
            "tokenizer": tokenizer,
            "text_encoder": text_encoder,
            "text_proj": text_proj,
            "super_res_first": tiny_super_res(),
            "super_res_last": tiny_super_res(),
            "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
            "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log"),
        }
        if prior:
            config: dict[str, Any] = {"variance_type": "fixed_small_log", "prediction_type": "sample"}
            parts |= {"prior": tiny_prior(), "prior_scheduler": UnCLIPScheduler(**config, clip_sample_range=5.0)}
            pipeline = UnCLIPPipeline(**parts)
        else:
            tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            vision = CLIPVisionConfig(**tiny, image_size=16, patch_size=8, projection_dim=WIDTH)
            parts |= {"feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)}
            parts |= {"image_encoder": drawn(CLIPVisionModelWithProjection(vision), seed)}
            pipeline = UnCLIPImageVariationPipeline(**parts)
    pipeline.save_pretrained(folder)
    return folder


def stock_karlo(folder: Path) -> Any:
    """Stock's pipeline, put together from the parts of a folder; its schedulers count in float64."""
    index = json.loads((folder / "model_index.json").read_text())
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    parts = {name: part_class(*entry, folder).from_pretrained(folder / name) for name, entry in listed.items()}  # type: ignore[attr-defined]
    for name in parts:
        if name.endswith("_scheduler"):
            config = {option: value for option, value in parts[name].config.items() if not option.startswith("_")}
            parts[name] = MendedUnCLIP(**config)
    kind = UnCLIPPipeline if "prior" in parts else UnCLIPImageVariationPipeline
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
