"""CLIP over open_clip, and the way between the libraries: tiny random models of both, equal numbers."""

import json
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer, CLIPModel, CLIPTokenizer

from clip_core.clip import CLIP
from clip_core.convert import (
    largest_difference,
    save_open_clip,
    save_transformers,
    to_transformers,
)
from clip_core.preprocess import Preprocess
from tests.tiny import tiny_clip, tiny_tokenizer

TEXTS = ["a small red circle", "", "naïve café 🙂 wow!", "left of right " * 20]
VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
LENGTH = 20


def text_config(**more: object) -> dict:
    return {"context_length": LENGTH, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2, **more}


def strengthen(model: nn.Module) -> nn.Module:
    """Weights large enough that a wrong place or order shows."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "logit_scale":
                weight.add_(torch.randn(weight.shape, generator=rng) * 0.2)
    return model.eval()


@cache
def simple_tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=LENGTH)


def native(kind: str) -> CLIP:
    torch.manual_seed(0)
    tokenizer = simple_tokenizer()
    if kind == "clip":
        model = open_clip.CLIP(12, VISION, text_config())
    elif kind == "quick gelu":
        model = open_clip.CLIP(12, VISION, text_config(), quick_gelu=True, nonscalar_logit_scale=True)
    else:
        eos = {"pool_type": "eos", "eos_id": tokenizer.eot_token_id, "norm_kwargs": {"eps": 1e-3}}
        model = open_clip.CustomTextCLIP(12, VISION, text_config(**eos))
    return CLIP(strengthen(model), tokenizer)


KINDS = ["clip", "quick gelu", "custom text"]


def pixels(size: int = 48) -> Tensor:
    return torch.rand(3, 3, size, size + 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_open_clip(kind: str) -> None:
    clip = native(kind)
    ids = clip.tokenizer(TEXTS)
    features = clip.text(TEXTS)
    torch.testing.assert_close(features.embedding, clip.model.encode_text(ids))
    torch.testing.assert_close(clip.image(pixels()), clip.model.encode_image(clip.preprocess.from_pixels(pixels())))
    # the states are those that open_clip pools: at the end of the text
    end = features.tokens[torch.arange(4), features.mask.sum(dim=1) - 1]
    projection = clip.model.text_projection if kind != "custom text" else clip.model.text.text_projection
    torch.testing.assert_close(features.embedding, end @ projection)
    assert features.tokens.shape == (4, LENGTH, 24) and clip.logit_scale.shape == ()
    scores = clip.model.get_logits(clip.preprocess.from_pixels(pixels()), ids[:3])[0] / clip.model.logit_scale.exp()
    torch.testing.assert_close(clip.score(pixels(), TEXTS[:3]), scores.diagonal())


def test_mask_ends_with_the_text(caplog: pytest.LogCaptureFixture) -> None:
    tokens = native("clip").tokenize(["!", "", TEXTS[3]])  # "!" has id 256 at a word's end, padding is id 0
    assert tokens.attention_mask.sum(dim=1).tolist() == [3, 2, LENGTH]
    assert tokens.input_ids[0, :4].tolist() == [49406, 256, 49407, 0]
    assert len(caplog.records) == 1 and "is cut to 20" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_clip_skip(kind: str) -> None:
    clip = native(kind)
    tower = clip.model if kind != "custom text" else clip.model.text
    caught: list[Tensor] = []
    hook = tower.transformer.resblocks[0].register_forward_hook(lambda *args: caught.append(args[-1]))
    skipped = clip.text(TEXTS, clip_skip=1)
    hook.remove()
    torch.testing.assert_close(skipped.tokens, tower.ln_final(caught[0]))
    torch.testing.assert_close(skipped.embedding, clip.text(TEXTS).embedding)
    torch.testing.assert_close(clip.text(TEXTS, clip_skip=0).tokens, clip.text(TEXTS).tokens)
    with pytest.raises(ValueError, match="give 0 to 1"):
        clip.text(TEXTS, clip_skip=2)


# Conversion


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_to_transformers_is_exact_and_stock_loads_it(kind: str, tmp_path: Path) -> None:
    clip = native(kind)
    converted = to_transformers(clip)
    assert isinstance(converted.model, CLIPModel) and isinstance(converted.tokenizer, CLIPTokenizer)
    assert largest_difference(clip, converted, TEXTS, pixels()) < 1e-5
    for skip in (0, 1):
        torch.testing.assert_close(clip.text(TEXTS, skip).tokens, converted.text(TEXTS, skip).tokens)
    save_transformers(clip, tmp_path)
    assert largest_difference(clip, CLIP.from_pretrained(tmp_path), TEXTS, pixels()) < 1e-5
    # what stock transformers makes of the folder, with its own padding
    stock, tokenizer = CLIPModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, clip.tokenize(TEXTS).input_ids) and tokenizer.pad_token_id == 0
    out = stock.get_text_features(input_ids=ids)
    torch.testing.assert_close(out.pooler_output, clip.text(TEXTS).embedding, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.last_hidden_state, clip.text(TEXTS).tokens, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    clip = native(kind)
    save_open_clip(to_transformers(clip), tmp_path)
    back = CLIP.from_pretrained(tmp_path)
    assert isinstance(back.model, open_clip.CLIP) and isinstance(back.tokenizer, HFTokenizer)
    assert largest_difference(clip, back, TEXTS, pixels()) < 1e-5
    before = {key.removeprefix("text."): value for key, value in clip.model.state_dict().items()}
    after = back.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value.reshape(after[key].shape)) for key, value in before.items())


@torch.no_grad()
def test_our_clip_in_open_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    preprocess = Preprocess(resize=64, crop=(64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    clip = CLIP(tiny_clip(tokenizer), tokenizer, preprocess)
    save_open_clip(clip, tmp_path / "ours")
    loaded = CLIP.from_pretrained(tmp_path / "ours")
    assert isinstance(loaded.model, open_clip.CLIP)
    assert largest_difference(clip, loaded, TEXTS, pixels(64)) < 1e-5
    # stock open_clip reads the folder, with its own tokenizer and preprocessing
    name = f"local-dir:{tmp_path / 'ours'}"
    model = open_clip.create_model(name).eval()
    ids = open_clip.get_tokenizer(name)(TEXTS)
    torch.testing.assert_close(model.encode_text(ids), clip.text(TEXTS).embedding, atol=1e-5, rtol=1e-4)
    # and back again
    save_transformers(loaded, tmp_path / "again")
    assert largest_difference(clip, CLIP.from_pretrained(tmp_path / "again"), TEXTS, pixels(64)) < 1e-5


def test_difference_sees_each_part() -> None:
    clip, other = native("clip"), native("clip")
    assert largest_difference(clip, other, TEXTS, pixels()) == 0
    with torch.no_grad():
        other.model.visual.proj[0, 0] += 1
    assert largest_difference(clip, other, TEXTS, pixels()) > 0.01
    shorter = CLIP(native("clip").model, open_clip.SimpleTokenizer(context_length=LENGTH - 1))
    assert largest_difference(clip, shorter, TEXTS, pixels()) == float("inf")


@pytest.mark.parametrize(
    ("vision", "text", "why"),
    [
        ({"pool_type": "avg"}, {}, "pools by 'avg'"),
        ({"no_ln_pre": True}, {}, "no visual.ln_pre.weight"),
        ({"ls_init_value": 0.1}, {}, "no place for visual.transformer.resblocks.0.ls_1.gamma"),
        ({"image_size": (32, 16)}, {}, "no square"),
        ({}, {"no_causal_mask": True}, "not causal"),
        ({}, {"pool_type": "last"}, "pools by 'last'"),
        ({}, {"proj_bias": True}, "no plain matrix"),
        ({}, {"pool_type": "eos", "eos_id": 5}, "pooled at id 5"),
    ],
)
def test_what_cannot_be_converted_is_said(vision: dict, text: dict, why: str) -> None:
    model = open_clip.CustomTextCLIP(12, {**VISION, **vision}, text_config(**text))
    tokenizer = simple_tokenizer()
    preprocess = Preprocess(resize=(32, 16), crop=None) if "image_size" in vision else None
    with pytest.raises(ValueError, match="cannot be converted exactly") as error:
        to_transformers(CLIP(model, tokenizer, preprocess))
    assert why in str(error.value)


def test_tokenizers_that_differ_are_refused() -> None:
    model = open_clip.CLIP(12, VISION, text_config())
    for options in ({"clean": "canonicalize"}, {"additional_special_tokens": ["<mask>"]}, {"reduction_mask": "simple"}):
        tokenizer = open_clip.SimpleTokenizer(context_length=LENGTH, **options)
        with pytest.raises(ValueError, match="its tokenizer"):
            to_transformers(CLIP(model, tokenizer))


# Folders that open_clip wrote


def write(folder: Path, model: nn.Module, config: dict, preprocess: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@torch.no_grad()
def test_folder_with_open_clips_own_tokenizer(tmp_path: Path) -> None:
    clip = native("clip")
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text_config()}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "resize_mode": "squash"}
    loaded = CLIP.from_pretrained(write(tmp_path, clip.model, config, preprocess))
    assert isinstance(loaded.tokenizer, open_clip.SimpleTokenizer) and loaded.max_length == LENGTH
    assert loaded.preprocess == Preprocess((32, 32), None, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", True)
    torch.testing.assert_close(loaded.text(TEXTS).tokens, clip.text(TEXTS).tokens)
    with pytest.raises(ValueError, match="convert it to transformers first"):
        save_open_clip(loaded, tmp_path / "again")


@torch.no_grad()
def test_hugging_face_text_tower(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "small"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    tower = tmp_path / "bert"
    BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(tower)
    config: dict = {
        "embed_dim": 12,
        "vision_cfg": VISION,
        "text_cfg": {
            "hf_model_name": str(tower),
            "hf_model_pretrained": False,
            "hf_tokenizer_name": "itself",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
            "context_length": LENGTH,
        },
    }
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**config)
    loaded = CLIP.from_pretrained(write(tmp_path, strengthen(model), config))
    features = loaded.text(["a small red circle", "a"])
    ids = loaded.tokenizer(["a small red circle", "a"])
    torch.testing.assert_close(features.embedding, model.encode_text(ids))
    assert features.mask.sum(dim=1).tolist() == [6, 3] and features.tokens.shape == (2, LENGTH, 16)
    with pytest.raises(ValueError, match="clip_skip needs a CLIP text tower"):
        loaded.text("a", clip_skip=1)
    with pytest.raises(ValueError, match="cannot be converted exactly"):
        to_transformers(loaded)
    # a name from the hub would need the network
    config["text_cfg"]["hf_model_name"] = "someone/bert"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match="from the hub"):
        CLIP.from_pretrained(tmp_path)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    clip = native("clip")
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text_config()}

    def refused(*words: str) -> None:
        with pytest.raises(ValueError) as error:
            CLIP.from_pretrained(tmp_path)
        text = str(error.value)
        assert "\n" not in text and all(word in text for word in words), text

    write(tmp_path, clip.model, {**config, "embed_dim": 13})
    refused("open_clip_model.safetensors", "size mismatch")
    write(tmp_path, clip.model, {**config, "vision_cfg": {**VISION, "colour": 3}})
    refused("open_clip_config.json", "colour")
    write(tmp_path, clip.model, {**config, "vision_cfg": {**VISION, "layers": 10**6}})
    refused("asks for layers=1000000 in its configuration; give 1000 at most")
    write(tmp_path, clip.model, {**config, "vision_cfg": {**VISION, "width": 16_000}})
    refused("asks for 6,", " numbers in its config.json, and its files hold 1,2")
    write(tmp_path, clip.model, {"embed_dim": 12})
    refused("open_clip_config.json is damaged")
    write(tmp_path, clip.model, config)
    whole = (tmp_path / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(whole[:1000])
    refused("open_clip_model.safetensors' is damaged")
    (tmp_path / "open_clip_model.safetensors").unlink()
    refused("open_clip_model.safetensors is missing")
    torch.save(clip.model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    refused("pickle (open_clip_pytorch_model.bin)")
    write(tmp_path, clip.model, {**config, "text_cfg": text_config(hf_tokenizer_name="x")})
    refused("tokenizer.json is missing")


def test_unknown_open_clip_names() -> None:
    with pytest.raises(ValueError, match="'ViT-B-32' has: openai, laion400m_e31"):
        CLIP.from_pretrained("open_clip:ViT-B-32/nothing")
    with pytest.raises(ValueError, match="open_clip knows no 'ViT-B-32'"):
        CLIP.from_pretrained("open_clip:ViT-B-32")
