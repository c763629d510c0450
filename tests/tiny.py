"""Tiny random models of the real classes, written as the ecosystem's own folders.

`make_tiny_stable_unclip` writes a diffusers StableUnCLIPPipeline folder with the reranking CLIP in `clip/`
beside it and an `unclip.json`, small enough for a network call to take milliseconds. The weights are random
but large enough that words, image embedding and noise level all show in the picture. The other families' folders
are as stock diffusers writes them, with nothing of ours; `make_tiny_clip` and `make_tiny_siglip` write what ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    PriorTransformer,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

from clip_core.tokenizer import train_tokenizer

WIDTH = 16  # D and E: text width, embedding width and prior.embedding_dim are one number
LENGTH = 32  # L
WORDS = "a small large red green blue yellow circle square star above below left of right on black white"


def tiny_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE that takes any text, trained on a dozen words."""
    return train_tokenizer([WORDS] * 10, vocab_size=700, max_length=LENGTH)


def tiny_text_config(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_factor": 5.0,
    }


def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = tiny_text_config(tokenizer)
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


def tiny_vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),  # three halvings: factor 8
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.8,
        **options,
    ).eval()


def tiny_unet(class_width: int | None = 2 * WIDTH, **options: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = dict(
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
    )
    return UNet2DConditionModel(**(config | options)).eval()


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
    save_clip(clip, tokenizer, folder / "clip")
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


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=half,
        image_std=half,
    ).save_pretrained(folder)


def make_tiny_clip(folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny random CLIP folder of both towers."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        save_clip(tiny_clip(tokenizer), tokenizer, folder)
    return folder


def make_tiny_siglip(folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny random SigLIP folder by transformers' own classes, with SigLIP 2's tokenizer of letters."""
    folder = Path(folder)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["▁", *(chr(ord("a") + k) for k in range(26)), *(f"<0x{k:02X}>" for k in range(256))]
    vocab = {token: number for number, token in enumerate([*special, *letters])}
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(vocab), "num_hidden_layers": 2, "max_position_embeddings": 40}
    vision = tower | {"num_hidden_layers": 1, "image_size": 48, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
        with torch.no_grad():
            for weight in (weight for name, weight in model.named_parameters() if not name.startswith("logit_")):
                weight.add_(torch.randn_like(weight) * 0.2)  # or every text would be told much the same
    model.save_pretrained(folder)
    Siglip2Tokenizer(vocab=vocab, merges=[], padding_side="right", model_max_length=40).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 48, "width": 48}, resample=2).save_pretrained(folder)
    return folder


def stable_diffusion_scheduler() -> PNDMScheduler:
    """As Stable Diffusion 1.5 and 2.1-base have it."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def ddim() -> DDIMScheduler:
    """By the same betas."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def make_tiny_stable_diffusion(
    folder: str | Path,
    version: int = 1,  # or 2: another padding, activation and counting of heads
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,  # None: PNDM, eps
    inpaints: bool = False,  # whether the UNet takes the mask and the masked picture
) -> Path:
    """Write a tiny random Stable Diffusion folder by diffusers' own pipeline; a seed fixes the model."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    heads: dict[str, Any] = {}
    if version == 2:
        tokenizer.pad_token = "!"
        heads = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = tiny_text_config(tokenizer, layers=3)
        text |= {"hidden_act": "gelu"} if version == 2 else {}
        pipeline = (StableDiffusionInpaintPipeline if inpaints else StableDiffusionPipeline)(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)).eval(),
            tokenizer=tokenizer,
            unet=tiny_unet(class_width=None, in_channels=9 if inpaints else 4, **heads),
            scheduler=scheduler or stable_diffusion_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_stable_diffusion_xl(
    folder: str | Path,
    seed: int = 0,
    empty_is_zeros: bool = True,
    vae: dict[str, Any] | None = None,  # options of the autoencoder; None: none
    refines: bool = False,  # whether it is a refiner: the second tower alone, and a score
    inpaints: bool = False,  # whether the UNet takes the mask and the masked picture
) -> Path:
    """Write a tiny random Stable Diffusion XL folder by diffusers' own pipeline; a seed fixes the model."""
    folder = Path(folder)
    width_2, pooled, of_time = 24, 20, 8  # D of the second tower, P, and of the sinusoids of each of six numbers
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    tokenizer_2.pad_token = "!"
    text = tiny_text_config(tokenizer, layers=3)
    text_2 = tiny_text_config(tokenizer_2, width_2, layers=4) | {"projection_dim": pooled, "hidden_act": "gelu"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = tiny_unet(
            class_width=None,
            in_channels=9 if inpaints else 4,
            cross_attention_dim=width_2 if refines else WIDTH + width_2,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=of_time,
            projection_class_embeddings_input_dim=pooled + (5 if refines else 6) * of_time,
        )
        kind: Any = StableDiffusionXLInpaintPipeline if inpaints else StableDiffusionXLPipeline
        kind, scored = (
            (StableDiffusionXLImg2ImgPipeline, {"requires_aesthetics_score": True}) if refines else (kind, {})
        )
        pipeline = kind(
            vae=tiny_vae(**(vae or {})),
            text_encoder=None if refines else CLIPTextModel(CLIPTextConfig(**text)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_2)).eval(),
            tokenizer=None if refines else tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            force_zeros_for_empty_prompt=empty_is_zeros,
            add_watermarker=False,
            **scored,
        )
    pipeline.save_pretrained(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    # as the published file says, for classes that are built from it and would clip
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}, indent=2) + "\n")
    return folder
