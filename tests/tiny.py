"""Tiny random models of the real classes, written as the ecosystem's own folders.

`make_tiny_stable_unclip` writes a diffusers StableUnCLIPPipeline folder with the reranking CLIP in `clip/`
beside it and an `unclip.json`, small enough for a network call to take milliseconds. The weights are random
but large enough that words, image embedding and noise level all show in the picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    PriorTransformer,
    SchedulerMixin,
    StableUnCLIPPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from clip_core.tokenizer import train_tokenizer

WIDTH = 16  # D and E: text width, embedding width and prior.embedding_dim are one number
LENGTH = 32  # L
WORDS = "a small large red green blue yellow circle square star above below left of right on black white"


def tiny_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE that takes any text, trained on a dozen words."""
    return train_tokenizer([WORDS] * 10, vocab_size=700, max_length=LENGTH)


def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_factor": 5.0,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "initializer_factor": 5.0,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),  # three halvings: factor 8
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.8,
    ).eval()


def tiny_unet(class_width: int | None = 2 * WIDTH) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        class_embed_type=None if class_width is None else "projection",
        projection_class_embeddings_input_dim=class_width,
    ).eval()
    return unet


def tiny_prior() -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=LENGTH,
        additional_embeddings=4,
    ).eval()
    with torch.no_grad():
        for weight in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
            weight.normal_()
        prior.clip_std.uniform_(0.5, 2.0)  # zeros by default, which would erase the prior's answer
    return prior


def decoder_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
    )


def prior_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type="sample",
        timestep_spacing="trailing",
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
    )


def make_tiny_stable_unclip(
    folder: str | Path,
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,  # None: DDIM, v prediction, trailing
    dtype: torch.dtype = torch.float32,  # of the weights on disk
) -> Path:
    """Write a tiny random Stable unCLIP folder, which stock diffusers loads too; a seed fixes the model."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        clip = tiny_clip(tokenizer)
        text_encoder = CLIPTextModel(clip.config.text_config).eval()
        text_encoder.load_state_dict(clip.text_model.state_dict())
        with_projection = CLIPTextModelWithProjection(clip.config.text_config).eval()
        with_projection.text_model.load_state_dict(clip.text_model.state_dict())
        with_projection.text_projection.load_state_dict(clip.text_projection.state_dict())
        normalizer = StableUnCLIPImageNormalizer(WIDTH)
        with torch.no_grad():
            normalizer.mean.normal_()
            normalizer.std.uniform_(0.5, 2.0)
        pipeline = StableUnCLIPPipeline(
            prior_tokenizer=tokenizer,
            prior_text_encoder=with_projection,
            prior=tiny_prior(),
            prior_scheduler=prior_scheduler(),
            image_normalizer=normalizer,
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=tiny_unet(),
            scheduler=scheduler or decoder_scheduler(),
            vae=tiny_vae(),
        )
    for module in (*pipeline.components.values(), clip):
        if isinstance(module, torch.nn.Module):
            torch.nn.Module.to(module, dtype)
    pipeline.save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=half,
        image_std=half,
    ).save_pretrained(folder / "clip")
    for part in ("clip", "text_encoder", "prior_text_encoder"):
        config = folder / part / "config.json"
        # or transformers loads float16 weights as such beside diffusers' float32, and stock fails on the mix
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    unclip = {
        "knows": "nothing: random weights for tests",
        "defaults": {
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "prior": True,
            "prior_num_inference_steps": 3,
        },
    }
    (folder / "unclip.json").write_text(json.dumps(unclip, indent=2) + "\n")
    return folder
