"""Tiny random Kandinsky folders of the real classes, saved by diffusers' own pipelines: prior, decoder and both in one.

The weights are random, but large enough for image embedding, words and the learned variance to show in the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyCombinedPipeline,
    KandinskyInpaintCombinedPipeline,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    SchedulerMixin,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

from tests.tiny import LENGTH, WIDTH, WORDS, tiny_text_config, tiny_tokenizer

BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
TEXT_WIDTH = 24  # of the multilingual text tower's states
VERSIONS = ("2.2", "2.1")
KINDS: dict[tuple[str, bool], tuple[Any, Any, Any]] = {  # of version and inpainting: decoder, prior, both
    ("2.2", False): (KandinskyV22Pipeline, KandinskyV22PriorPipeline, KandinskyV22CombinedPipeline),
    ("2.2", True): (KandinskyV22InpaintPipeline, KandinskyV22PriorPipeline, KandinskyV22InpaintCombinedPipeline),
    ("2.1", False): (KandinskyPipeline, KandinskyPriorPipeline, KandinskyCombinedPipeline),
    ("2.1", True): (KandinskyInpaintPipeline, KandinskyPriorPipeline, KandinskyInpaintCombinedPipeline),
}


def tiny_movq() -> VQModel:
    movq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32, 32),  # three halvings: factor 8; a spatial norm has 32 groups
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=4,
        norm_type="spatial",
    ).eval()
    with torch.no_grad():
        movq.decoder.conv_out.weight *= 0.1  # or most pixels are clipped
    return movq


def tiny_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        **config,
    ).eval()


def tiny_tokenizer_2_1() -> XLMRobertaTokenizer:
    """Pieces of a dozen words, and every letter by itself."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [f"\u2581{word}" for word in dict.fromkeys(WORDS.split())] + ["\u2581", *letters]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(piece, 0.0) for piece in special] + [(piece, -float(rank)) for rank, piece in enumerate(pieces, 1)]
    return XLMRobertaTokenizer(vocab=[*vocab, ("<mask>", 0.0)], model_max_length=512)


def tiny_text_encoder_2_1(tokenizer: XLMRobertaTokenizer) -> MultilingualCLIP:
    config = MCLIPConfig(
        transformerDimSize=TEXT_WIDTH,
        imageDimSize=WIDTH,
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,  # 77 tokens, and two that no token has
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
        type_vocab_size=1,
    )
    return MultilingualCLIP(config).eval()


def tiny_clip_towers() -> dict[str, Any]:
    """What Kandinsky's prior knows of CLIP, by its names in the prior's folder."""
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        initializer_factor=5.0,
    )
    half = [0.5, 0.5, 0.5]
    return {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**tiny_text_config(tokenizer))).eval(),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "image_processor": CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=half, image_std=half
        ),
    }


def tiny_kandinsky_prior() -> dict[str, Any]:
    """A prior's parts by their names in its folder."""
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH, num_embeddings=LENGTH
    ).eval()
    with torch.no_grad():
        for weight in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
            weight.normal_()
        prior.clip_std.uniform_(0.5, 2.0)  # zeros by default, which would erase the prior's answer
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
    )
    return tiny_clip_towers() | {"prior": prior, "scheduler": scheduler}


def make_tiny_kandinsky(
    root: str | Path,
    version: str = "2.2",  # or "2.1"
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,  # of the decoder; None: as published, 2.2's ancestral and 2.1's not
    inpaints: bool = False,  # whether its UNet takes a mask beside x
) -> dict[str, Path]:
    """Write folders "decoder", "prior" and "combined" of one tiny random model; a seed fixes it."""
    root = Path(root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = tiny_kandinsky_prior()
        config: dict[str, Any] = {"in_channels": 9 if inpaints else 4}
        if version == "2.2":
            config |= {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
            decoder: dict[str, Any] = {
                "unet": tiny_unet(config | {"encoder_hid_dim": WIDTH, "cross_attention_dim": 20})
            }
            own: SchedulerMixin = DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range")
        else:
            config |= {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
            config |= {"encoder_hid_dim": TEXT_WIDTH, "cross_attention_dim": WIDTH}
            tokenizer = tiny_tokenizer_2_1()
            decoder = {"unet": tiny_unet(config), "tokenizer": tokenizer}
            decoder["text_encoder"] = tiny_text_encoder_2_1(tokenizer)
            own = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        decoder |= {"movq": tiny_movq(), "scheduler": scheduler or own}
    of_prior = {f"prior_{name}": part for name, part in prior.items()}
    for name, kind, parts in zip(
        ("decoder", "prior", "combined"), KINDS[version, inpaints], (decoder, prior, decoder | of_prior), strict=True
    ):
        kind(**parts).save_pretrained(root / name)
    return {name: root / name for name in ("decoder", "prior", "combined")}
