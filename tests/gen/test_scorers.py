"""Whatever ranks: CLIPs and SigLIPs of transformers, open_clip's ViTs and ResNets, CLIPs fine-tuned to people's taste.

Scores beside those that the library itself makes of the pictures on file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipModel,
)
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

from gen import TextToImage
from tests.stock import LONG
from tests.tiny import (
    make_tiny_clip,
    make_tiny_siglip,
    make_tiny_stable_diffusion,
    save_clip,
    tiny_clip,
    tiny_tokenizer,
)

VIT = {"image_size": 64, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}


def write_open_clip(folder: Path, vision: dict[str, Any]) -> Path:
    """As open_clip's `push_to_hf_hub` lays a model out, with open_clip's own vocabulary."""
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name != "logit_scale":
                    weight.add_(torch.randn_like(weight) * 0.1)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_pickscore(folder: Path) -> Path:
    """As PickScore and its kind are published: a CLIPModel trained on, pooling at the highest id, padding with "!"."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = tiny_clip(tokenizer)
        with torch.no_grad():
            model.logit_scale.fill_(4.6)
    tokenizer.pad_token = "!"
    save_clip(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # transformers' old default, which pools at the highest id
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_transformers(folder: Path, pictures: list[Image.Image], text: str) -> Tensor:
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    assert isinstance(model.config, CLIPConfig)
    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
    output = model(input_ids=ids, pixel_values=pixels)
    return cosine_similarity(output.image_embeds, output.text_embeds)


def by_siglip(folder: Path, pictures: list[Image.Image], text: str) -> Tensor:
    model, tokenizer = SiglipModel.from_pretrained(folder), Siglip2Tokenizer.from_pretrained(folder)
    pixels = SiglipImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    ids = tokenizer([text], padding="max_length", max_length=40, truncation=True, return_tensors="pt").input_ids
    output = model(input_ids=ids, pixel_values=pixels)
    return cosine_similarity(output.image_embeds, output.text_embeds)


def by_open_clip(folder: Path, pictures: list[Image.Image], text: str) -> Tensor:
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pixels = torch.stack([prepare(picture) for picture in pictures])  # type: ignore[operator]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")([text])
    return cosine_similarity(model.encode_image(pixels), model.encode_text(ids))


SCORERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, list[Image.Image], str], Tensor]]] = {
    "clip": (make_tiny_clip, by_transformers),
    "siglip": (make_tiny_siglip, by_siglip),
    "pickscore": (write_pickscore, by_transformers),
    "open_clip": (lambda folder: write_open_clip(folder, VIT), by_open_clip),
    "resnet": (lambda folder: write_open_clip(folder, RESNET), by_open_clip),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("scorers") / "model")


@pytest.mark.parametrize("kind", SCORERS)
@torch.no_grad()
def test_scores_are_the_librarys_own(folder: Path, tmp_path: Path, kind: str) -> None:
    write, score = SCORERS[kind]
    scorer = write(tmp_path / "scorer")
    model = TextToImage.from_pretrained(folder, device="cpu", clip=scorer)
    result = model(LONG, num_images_per_prompt=5, keep=3, seed=1, num_inference_steps=2)
    assert isinstance(result.images, list) and result.scores is not None
    theirs = score(scorer, result.images, LONG)
    assert result.scores == pytest.approx(theirs.tolist(), abs=2e-3 if kind == "siglip" else 1e-4)
    assert result.scores == sorted(result.scores, reverse=True)
    every = sorted((one.score or 0.0 for one in result.candidates), reverse=True)
    assert every[:3] == result.scores and every[0] - every[-1] > 1e-4  # they tell the candidates apart
    assert result.records[0]["clip_hash"] == model.clip_hash


def test_a_model_ranked_by_a_resnet_is_not_saved_by_halves(folder: Path, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(folder, device="cpu", clip=write_open_clip(tmp_path / "resnet", RESNET))
    with pytest.raises(ValueError, match="cannot be converted exactly: its image tower is a ModifiedResNet") as caught:
        model.save(tmp_path / "saved")
    assert "\n" not in str(caught.value) and not (tmp_path / "saved").exists()


def test_an_open_clip_vit_is_saved_beside_as_transformers_own(folder: Path, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(folder, device="cpu", clip=write_open_clip(tmp_path / "vit", VIT))
    asked: dict[str, Any] = {"num_images_per_prompt": 3, "seed": 1, "num_inference_steps": 2}
    again = TextToImage.from_pretrained(model.save(tmp_path / "saved"), device="cpu")
    assert isinstance(CLIPModel.from_pretrained(tmp_path / "saved" / "clip"), CLIPModel)
    one, other = (each(LONG, **asked) for each in (model, again))
    assert one.seeds == other.seeds and one.scores == pytest.approx(other.scores, abs=1e-5)
