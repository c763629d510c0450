"""Models of random weights as stock diffusers folders, for sizes that no bundled model has.

Words and pictures show in what such a model answers, so that an error in painting or ranking shows too.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from clip_core.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Shape:
    """A model of random weights, in the layout of Stable unCLIP."""

    unet: tuple[int, ...]  # channels of each level; all but the last attend
    unet_layers: int
    unet_heads: int
    latent_size: int  # cells along each side
    vae: tuple[int, ...]  # channels of each level
    groups: int  # of every group norm
    text: tuple[int, int, int]  # CLIP's text tower: width, which is the embedding's too, layers, heads
    vision: tuple[int, int, int]  # CLIP's image tower: width, layers, heads
    image_size: int  # pixels that CLIP looks at
    patch_size: int
    text_tokens: int = 77


SMALL = Shape(
    unet=(128, 256, 256),  # 36 M parameters
    unet_layers=2,
    unet_heads=8,
    latent_size=32,
    vae=(32, 64, 128, 128),
    groups=32,
    text=(384, 12, 6),  # ViT-S/32
    vision=(384, 12, 6),
    image_size=224,
    patch_size=32,
)
MEDIUM = replace(SMALL, unet=(128, 256, 512, 512))  # 139 M parameters
STABLE_DIFFUSION = Shape(
    unet=(320, 640, 1280, 1280),  # that of version 1.5 and a class input: 863 M parameters
    unet_layers=2,
    unet_heads=8,
    latent_size=64,
    vae=(128, 256, 512, 512),
    groups=32,
    text=(768, 12, 12),  # ViT-L/14
    vision=(1024, 24, 16),
    image_size=224,
    patch_size=14,
)
TINY = Shape(
    unet=(8, 16),
    unet_layers=1,
    unet_heads=2,
    latent_size=8,
    vae=(4, 4, 8, 8),
    groups=4,
    text=(16, 2, 2),
    vision=(16, 1, 2),
    image_size=64,
    patch_size=16,
    text_tokens=32,
)


def write_random(shape: Shape, prompt: str, folder: Path) -> int:
    """Write a folder that stock diffusers and we load, CLIP in clip/ beside it; the UNet's parameters are returned.

    Its tokenizer knows the prompt alone.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        tokenizer = train_tokenizer([prompt] * 10, vocab_size=700, max_length=shape.text_tokens)
        clip = random_clip(shape, tokenizer)
        text_encoder = CLIPTextModel(clip.config.text_config).eval()
        text_encoder.load_state_dict(clip.text_model.state_dict())
        unet = random_unet(shape)
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=None,
            image_encoder=no_image_encoder(shape.text[0]),
            image_normalizer=StableUnCLIPImageNormalizer(shape.text[0]),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=DDIMScheduler(
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
            ),
            vae=random_vae(shape),
        ).save_pretrained(folder)
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) | {
        "_class_name": "StableUnCLIPPipeline"
    }  # which paints texts; no prior needed
    index.write_text(json.dumps(content, indent=2) + "\n")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    size = shape.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder / "clip"
    )
    return num_parameters(unet)


def random_clip(shape: Shape, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Weights large enough that words and pictures show in the scores."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return sizes | {"num_attention_heads": heads, "initializer_factor": 5.0}

    words = {"vocab_size": len(tokenizer), "max_position_embeddings": shape.text_tokens}
    words |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    seen = {"image_size": shape.image_size, "patch_size": shape.patch_size}
    text, vision = tower(*shape.text) | words, tower(*shape.vision) | seen
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.text[0])).eval()


def random_unet(shape: Shape) -> UNet2DConditionModel:
    """Its answers are as large as the noise, so that an error in it shows in the latents."""
    width, attending = shape.text[0], len(shape.unet) - 1
    unet = UNet2DConditionModel(
        sample_size=shape.latent_size,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        block_out_channels=shape.unet,
        layers_per_block=shape.unet_layers,
        attention_head_dim=shape.unet_heads,  # the number of heads, by diffusers' own mistake
        norm_num_groups=shape.groups,
        cross_attention_dim=width,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * width,
    ).eval()
    noise = torch.randn(1, 4, shape.latent_size, shape.latent_size)
    answer = unet(noise, 500, torch.randn(1, shape.text_tokens, width), class_labels=torch.zeros(1, 2 * width)).sample
    scale_up(unet.conv_out, 1.0 / answer.std().item())
    return unet


def random_vae(shape: Shape) -> AutoencoderKL:
    """Its pictures use the whole range."""
    levels = len(shape.vae)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=shape.vae,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=shape.groups,
        sample_size=shape.latent_size * 2 ** (levels - 1),
        scaling_factor=1.0,
    ).eval()
    pixels = vae.decode(torch.randn(1, 4, shape.latent_size, shape.latent_size)).sample
    scale_up(vae.decoder.conv_out, 0.5 / pixels.std().item())
    return vae


def scale_up(layer: nn.Conv2d, factor: float) -> None:
    """Multiply what a layer answers."""
    for weight in layer.parameters():
        weight.mul_(factor)


def no_image_encoder(width: int = 8) -> CLIPVisionModelWithProjection:
    """What stock's pipeline has to have and, told an embedding, asks for nothing but the type of its weights."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny = CLIPVisionConfig(**sizes, projection_dim=width)
    return CLIPVisionModelWithProjection(tiny).eval()


def num_parameters(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())
