"""Stable Diffusion 1.5, 2.1, XL and its refiner at full size, without memory: every part on the meta device.

The configurations are the published ones. That they are is known from how many numbers the published files hold, and
that we take them, from the stock classes' own keys and shapes going in and coming out, with a call of each network.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.weights import read_json
from gen.card import Card
from gen.checkpoint import Parts
from gen.conditioning import Conditions, Table
from gen.families import FAMILIES
from gen.model_index import listed, part_class
from gen.part import unfilled
from gen.request import Request
from gen.resolve import resolve
from gen.scheduler import NoiseLevels
from gen.single_file import CONFIGS
from tests.full_size import FULL, at_full_size
from tests.stock import shapes

UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_full_size(name: str) -> None:
    full = FULL[name]
    parts = at_full_size(full)
    for part, number in full["numbers"].items():
        assert sum(weight.numel() for weight in parts[part].parameters()) == number, part

    family = FAMILIES[full["class"].__name__]
    options = full.get("options", {})
    model = family.of(Parts(full["class"].__name__, parts, None, Card(), Path(name), options))
    size, sampler, kind = full["paints"]
    settings = model.abilities.defaults
    assert (settings.height, settings.width, settings.sampler) == (size, size, sampler)
    assert model.levels.scaling.prediction_type == kind

    left_out = dict.fromkeys({"tokenizer", "text_encoder"} - parts.keys())
    stock = full["class"](**parts, **left_out, **options, **({} if "XL" in name else UNCHECKED))
    ours = {part: module for part, module in model.parts().items() if isinstance(module, nn.Module)}
    theirs = {part: module for part, module in stock.components.items() if isinstance(module, nn.Module)}
    assert {part: shapes(module) for part, module in ours.items()} == {
        part: shapes(module) for part, module in theirs.items()
    }
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    kinds |= {"text_encoder_2": CLIPTextModelWithProjection}
    assert {part: type(module) for part, module in ours.items()} == {part: kinds[part] for part in ours}
    assert isinstance(model.text.tokenizer, CLIPTokenizer)

    # a prompt and its null through towers, UNet and autoencoder
    (candidate,) = resolve(Request(prompt="a star", seed=0, **full.get("words", {})), model.abilities).candidates
    ((prompt, null),) = model.encode_prompts([candidate], Table())
    assert null is not None
    for each in (prompt, null):
        assert each.encoder_hidden_states is not None
        assert each.encoder_hidden_states.shape == (77, full["unet"]["cross_attention_dim"])
    x = torch.empty(2, *model.latent_shape(settings), device="meta")
    assert x.shape[1:] == (4, size // 8, size // 8)
    assert model.call(x, torch.empty(2, device="meta"), Conditions((null, prompt))).shape == x.shape
    assert model.decode(x).shape == (2, 3, size, size)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("stable-diffusion-v1-5", "1.5"),
        ("stable-diffusion-2-1", "2.1"),
        ("stable-diffusion-2-1-base", "2.1"),
        ("stable-diffusion-xl-base-1.0", "XL"),
        ("stable-diffusion-xl-refiner-1.0", "XL refiner"),
    ],
)
def test_the_configurations_of_single_files_are_the_published_ones(config: str, name: str) -> None:
    folder = CONFIGS / config
    parts = listed(read_json(folder / "model_index.json"))
    for part, number in FULL[name]["numbers"].items():
        content = read_json(folder / part / "config.json")
        network = unfilled(part_class(*parts[part], folder), content)
        assert sum(weight.numel() for weight in network.parameters()) == number, part
    stock = parts["scheduler"][1]
    levels = NoiseLevels.of(getattr(diffusers, stock).from_pretrained(folder / "scheduler"), config)
    expected = ("pndm", "eps") if config.endswith("base") else FULL[name]["paints"][1:]
    assert (levels.sampler, levels.scaling.prediction_type) == expected
