"""Kandinsky 2.2 and 2.1 at full size on the meta device: keys and shapes of every part, and a call of each network.

The configurations are those that diffusers' conversion of the published weights uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

from gen import edit
from gen.card import Card
from gen.checkpoint import Parts
from gen.conditioning import Condition, Conditions, Table
from gen.families import FAMILIES
from gen.families.base import FamilyModel
from gen.model_index import part_class
from gen.request import Request
from gen.resolve import resolve
from tests.stock import shapes
from tests.tiny import tiny_tokenizer
from tests.tiny_kandinsky import BETAS, tiny_tokenizer_2_1

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (384, 768, 1152, 1536),
    "layers_per_block": 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
MOVQ: dict[str, Any] = {
    "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
BIG_G_EYES = {"hidden_size": 1664, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 48}
L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
L_EYES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}

FULL: dict[str, dict[str, Any]] = {
    "2.2": {
        "class": "KandinskyV22CombinedPipeline",
        "unet": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 1280},
        "width": 1280,
        "text": BIG_G,
        "image": {**BIG_G_EYES, "patch_size": 14},
        "scheduler": DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range"),
    },
    "2.1": {
        "class": "KandinskyCombinedPipeline",
        "unet": {
            "addition_embed_type": "text_image",
            "encoder_hid_dim_type": "text_image_proj",
            "encoder_hid_dim": 1024,
        },
        "width": 768,
        "text": L,
        "image": {**L_EYES, "patch_size": 14},
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    },
}
XLM = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}


def at_full_size(version: str, in_channels: int = 4) -> dict[str, Any]:
    """Parts by their names; networks of the classes that our loader takes, on the meta device."""
    full, where = FULL[version], Path("model_index.json")
    tokenizer, width = tiny_tokenizer(), full["width"]  # its words are of no account here, the length is
    tokenizer.model_max_length = 77
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}

    def made(library: str, name: str, *args: Any, **named: Any) -> Any:
        return part_class(library, name, where)(*args, **named)

    with torch.device("meta"):
        parts = {
            "unet": made("diffusers", "UNet2DConditionModel", **(UNET | full["unet"] | {"in_channels": in_channels})),
            "movq": made("diffusers", "VQModel", **MOVQ),
            "prior_prior": made("diffusers", "PriorTransformer", embedding_dim=width),
            "prior_text_encoder": made(
                "transformers",
                "CLIPTextModelWithProjection",
                CLIPTextConfig(**text, **full["text"], projection_dim=width),
            ),
            "prior_image_encoder": made(
                "transformers", "CLIPVisionModelWithProjection", CLIPVisionConfig(**full["image"], projection_dim=width)
            ),
        }
        if version == "2.1":
            config = MCLIPConfig(**XLM, vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)
            parts["text_encoder"] = made("kandinsky", "MultilingualCLIP", config)
            parts["tokenizer"] = tiny_tokenizer_2_1()
    parts |= {"scheduler": full["scheduler"], "prior_tokenizer": tokenizer}
    parts["prior_scheduler"] = UnCLIPScheduler(prediction_type="sample", clip_sample_range=10)
    return parts | {"prior_image_processor": CLIPImageProcessor()}


def assert_stocks_weights(model: FamilyModel, stock: Any) -> None:
    """Classes, keys and shapes of every network."""
    ours = {part: module for part, module in model.parts().items() if isinstance(module, nn.Module)}
    theirs = {part: module for part, module in stock.components.items() if isinstance(module, nn.Module)}
    assert {part: shapes(module) for part, module in ours.items()} == {
        part: shapes(module) for part, module in theirs.items()
    }
    assert {part: type(module) for part, module in ours.items()} == {
        part: type(module) for part, module in theirs.items()
    }


@pytest.mark.parametrize(
    ("version", "billions"),  # of weights, as the model cards count them
    [
        ("2.2", {"unet": 1.25, "movq": 0.07, "prior_prior": 1.03, "prior_image_encoder": 1.84}),
        ("2.1", {"unet": 1.23, "movq": 0.07, "prior_prior": 1.02, "text_encoder": 0.56}),
    ],
)
@torch.no_grad()
def test_full_size(version: str, billions: dict[str, float]) -> None:
    parts = at_full_size(version)
    for part, number in billions.items():
        weights = sum(weight.numel() for weight in parts[part].parameters())
        assert weights / 1e9 == pytest.approx(number, abs=0.02), part
    name = FULL[version]["class"]
    model = FAMILIES[name].of(Parts(name, parts, None, Card(), Path(version)))
    settings = model.abilities.defaults
    assert (settings.height, settings.width, settings.prior, model.abilities.can_rank) == (512, 512, True, True)

    assert_stocks_weights(model, getattr(diffusers, name)(**parts))

    # a prompt through the prior's towers, and an embedding and its null through UNet and autoencoder
    asked = Request(prompt="a star", negative_prompt="blue", seed=0)
    candidates = resolve(asked, model.abilities).candidates
    assert model.prior is not None and model.prior.num_answers(candidates[0]) == 2
    (row,) = model.prior.rows(candidates, ["key"], Table())
    width = FULL[version]["width"]
    states = row.prompt.encoder_hidden_states
    assert states is not None and states.shape == (77, FULL[version]["text"]["hidden_size"])
    x = torch.empty(2, width, device="meta")
    assert row.null is not None
    conditions = Conditions((row.null, row.prompt))
    assert model.prior.cached_network()(x, torch.empty(2, device="meta"), conditions).shape == (2, width)
    words = Condition()
    if version == "2.1":  # XLM-RoBERTa looks at its mask, so it cannot run without memory
        words = Condition(torch.empty(77, XLM["hidden_size"], device="meta"), torch.empty(width, device="meta"))
    shown = Conditions(
        tuple(model.add_image_embeds(candidates * 2, [words] * 2, [torch.empty(width, device="meta")] * 2))
    )
    x = torch.empty(2, *model.latent_shape(settings), device="meta")
    assert x.shape[1:] == (4, 64, 64)
    assert model.call(x, torch.empty(2, device="meta"), shown).shape == (2, 8, 64, 64)
    assert model.decode(x).shape == (2, 3, 512, 512)


@pytest.mark.parametrize(
    ("version", "name"),
    [("2.2", "KandinskyV22InpaintCombinedPipeline"), ("2.1", "KandinskyInpaintCombinedPipeline")],
)
@torch.no_grad()
def test_full_size_for_inpainting(version: str, name: str) -> None:
    """The UNet sees nine channels; the other parts are those of text to image."""
    parts = at_full_size(version, in_channels=9)
    model = FAMILIES[name].of(Parts(name, parts, None, Card(), Path(version)))
    assert model.saved_as == name and model.abilities.inpaints_alone
    assert_stocks_weights(model, getattr(diffusers, name)(**parts))
    assert model.unet.conv_in.weight.shape == (384, 9, 3, 3)
    abilities, height, width = model.abilities, 512, 768
    asked = Request(prompt="a star", image=torch.rand(3, height, width), mask_image=torch.ones(height, width), seed=0)
    (candidate,) = resolve(asked, abilities).candidates
    x = torch.empty(1, *model.latent_shape(candidate.settings), device="meta")
    (read,) = edit.read(model, [candidate])
    begins = edit.beginning(candidate, read, x.shape[1:], edit.schedule_of(model.levels, candidate.settings))
    assert begins.concat_channels is not None and begins.concat_channels.shape == (5, height // 8, width // 8)
    words, width = Condition(), FULL[version]["width"]
    if version == "2.1":
        words = Condition(torch.empty(77, XLM["hidden_size"], device="meta"), torch.empty(width, device="meta"))
    (shown,) = model.add_image_embeds([candidate], [words], [torch.empty(width, device="meta")])
    condition, _ = begins.with_concat_channels((shown, None))
    assert model.call(x, torch.empty(1, device="meta"), Conditions((condition,))).shape == (1, 8, *x.shape[2:])
