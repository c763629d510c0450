"""Stable unCLIP 2.1 at full size, without memory: by CLIP L with Karlo's prior, and by OpenCLIP H as it is published.

Every part on the meta device: the stock classes' keys and shapes going in and coming out, and a call of each network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    PriorTransformer,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from gen.card import Card
from gen.checkpoint import Parts
from gen.conditioning import Conditions, Table
from gen.families.stable_unclip import StableUnCLIP
from gen.model_index import IMAGE_PARTS, part_class
from gen.request import Request
from gen.resolve import resolve
from tests.full_size import CLIP_L, FULL, at_full_size
from tests.stock import shapes

EYES: dict[int, dict[str, Any]] = {  # by the width of the embedding
    768: {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
    1024: {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32},
        "hidden_act": "gelu",
    },
}


def parts_of(width: int, has_prior: bool) -> dict[str, Any]:
    """Parts by their names; networks of the classes that our loader takes, on the meta device."""
    full = FULL["2.1"]
    class_input = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * width}
    parts = at_full_size(full | {"unet": full["unet"] | class_input})
    where = Path("model_index.json")
    with torch.device("meta"):
        parts["image_normalizer"] = part_class("stable_diffusion", "StableUnCLIPImageNormalizer", where)(width)
        vision = CLIPVisionConfig(**EYES[width], patch_size=14, projection_dim=width)
        parts["image_encoder"] = CLIPVisionModelWithProjection(vision)
        if has_prior:
            text = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "projection_dim": width}
            parts["prior"] = PriorTransformer()
            parts["prior_text_encoder"] = CLIPTextModelWithProjection(CLIPTextConfig(**text, **CLIP_L))
    parts |= {"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
    parts["feature_extractor"] = CLIPImageProcessor()
    if has_prior:
        parts["prior_scheduler"] = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5)
        parts["prior_tokenizer"] = parts["tokenizer"]
    return parts


@pytest.mark.parametrize(
    ("width", "has_prior", "numbers"),
    [
        # Stable Diffusion 2.1's and the class embedding's two layers
        (768, True, 865_910_724 + 1280 * (1536 + 1) + 1280 * (1280 + 1)),
        (1024, False, 865_910_724 + 1280 * (2048 + 1) + 1280 * (1280 + 1)),
    ],
)
@torch.no_grad()
def test_full_size(width: int, has_prior: bool, numbers: int) -> None:
    parts = parts_of(width, has_prior)
    assert sum(weight.numel() for weight in parts["unet"].parameters()) == numbers
    family = "StableUnCLIPPipeline" if has_prior else "StableUnCLIPImg2ImgPipeline"
    model = StableUnCLIP.of(Parts(family, parts, None, Card(), Path("unclip")))
    settings = model.abilities.defaults
    assert (settings.height, settings.width, settings.prior) == (768, 768, has_prior)
    assert (model.saved_as, model.levels.scaling.prediction_type, model.embedding_width) == (family, "v", width)

    if has_prior:
        stock: Any = StableUnCLIPPipeline(**{name: part for name, part in parts.items() if name not in IMAGE_PARTS})
    else:
        stock = StableUnCLIPImg2ImgPipeline(**parts)
    theirs = {part: shapes(module) for part, module in stock.components.items() if isinstance(module, nn.Module)}
    ours = {part: shapes(module) for part, module in model.parts().items() if isinstance(module, nn.Module)}
    assert ours == theirs | {"image_encoder": shapes(parts["image_encoder"])}

    # a prompt, its null and an embedding through prior, towers, UNet and autoencoder, and a picture's through its tower
    embeds = torch.empty(1, width, device="meta")
    assert model.image_encoder(torch.empty(1, 3, 224, 224, device="meta")).image_embeds.shape == embeds.shape
    asked = Request(prompt="a star", seed=0, image_embeds=None if has_prior else torch.zeros(1, width))
    (candidate,) = resolve(asked, model.abilities).candidates
    if model.prior is not None:
        (row,) = model.prior.rows([candidate], ["key"], Table())
        assert row.null is not None
        conditions = Conditions((row.null, row.prompt))
        answer = model.prior.cached_network()(
            torch.empty(2, width, device="meta"), torch.empty(2, device="meta"), conditions
        )
        assert answer.shape == (2, width)
    (prompt, null) = model.encode_prompts([candidate], Table())[0]
    assert prompt.encoder_hidden_states is not None and prompt.encoder_hidden_states.shape == (77, 1024)
    assert null is not None and null.pooled_projections is not None
    assert null.pooled_projections.shape == (2 * width,)
    x = torch.empty(2, *model.latent_shape(settings), device="meta")
    assert model.call(x, torch.empty(2, device="meta"), Conditions((null, null.copy()))).shape == x.shape
    assert model.decode(x).shape == (2, 3, 768, 768)
