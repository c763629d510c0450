"""Stable Diffusion 1 and 2 folders that diffusers wrote, painted by us and by stock diffusers: the same pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen import Request, TextToImage
from gen.scheduler import STOCK
from tests.stock import (
    LATENTS,
    LONG,
    PROMPTS,
    SEED,
    SHORT,
    apart,
    assert_same,
    assert_same_sampled,
    edited,
    start,
    stock_of,
)
from tests.tiny import make_tiny_clip, make_tiny_stable_diffusion


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stable_diffusion")
    v = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    v_scheduler = DDIMScheduler(**v, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    return {
        "1": make_tiny_stable_diffusion(root / "1", version=1),
        "2": make_tiny_stable_diffusion(root / "2", version=2),
        "2-v": make_tiny_stable_diffusion(root / "2-v", version=2, scheduler=v_scheduler),
    }


@pytest.fixture(scope="session")
def ranking_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


# --- the same pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1", "2", "2-v"])
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    "guided",
    [{"guidance_scale": 1.0}, {"guidance_scale": 7.5}, {"guidance_scale": 3.0, "negative_prompt": ["blue", LONG]}],
    ids=["unguided", "guided", "negative"],
)
def test_pictures_equal_stock(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str, n: int, guided: dict[str, Any]
) -> None:
    assert_same(models[kind], stock_of(StableDiffusionPipeline, folders[kind]), PROMPTS, n, **guided)


def test_the_reference_can_fail(models: dict[str, TextToImage]) -> None:
    """Words, their padding, guidance and negative prompt all show, so that equality above says something."""
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "num_inference_steps": 5}
    plain = models["1"](SHORT, **asked).images
    for other in (
        models["1"](LONG, **asked).images,
        models["1"](SHORT, guidance_scale=1.0, **asked).images,
        models["1"](SHORT, negative_prompt="blue", **asked).images,
        models["1"](SHORT, clip_skip=1, **asked).images,
    ):
        assert (plain - other).abs().max() > 1e-2 * plain.abs().max()
    text = models["2"].model.text
    padded = text([SHORT]).tokens
    text.tokenizer.pad_token = text.tokenizer.eos_token
    try:
        assert (text([SHORT]).tokens - padded).abs().max() > 1e-2
    finally:
        text.tokenizer.pad_token = "!"


def test_the_padding_is_the_tokenizers(models: dict[str, TextToImage]) -> None:
    one, two = models["1"].model.text.tokenizer, models["2"].model.text.tokenizer
    assert (one.pad_token_id, two.pad_token_id) == (one.eos_token_id, 0)
    assert models["2"].model.unet.config.attention_head_dim == [2, 4]  # of heads, as the checkpoints say it


def test_other_sizes_equal_stock(models: dict[str, TextToImage], folders: dict[str, Path]) -> None:
    asked: dict[str, Any] = {"height": 48, "width": 80, "num_inference_steps": 4}
    asked["output_type"] = "latent"
    theirs = stock_of(StableDiffusionPipeline, folders["1"])(SHORT, latents=start(1, 1, (6, 10)), **asked).images
    assert apart(models["1"](SHORT, seed=SEED, **asked).images, theirs) <= LATENTS


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("kind", ["1", "2-v"])
def test_another_sampler_equals_stocks_class(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str, sampler: str
) -> None:
    """Ours, and the class that is built from the checkpoint's configuration; one CPU generator for each picture."""
    name, options = STOCK[sampler]
    stock = stock_of(StableDiffusionPipeline, folders[kind])
    config = {**stock.scheduler.config, "clip_sample": False}  # as published files say, of whichever class
    stock.scheduler = getattr(diffusers, name).from_config(config, **options)
    assert_same_sampled(models[kind], stock, sampler)


# --- clip_skip, which stock cannot do ----------------------------------------------------------------------------


def test_stocks_clip_skip_crashes(folders: dict[str, Path]) -> None:
    """The day this fails, compare with stock below."""
    with pytest.raises(AttributeError, match="text_model"):
        stock_of(StableDiffusionPipeline, folders["1"])(SHORT, clip_skip=1, num_inference_steps=1)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_is_an_earlier_layer_and_the_final_norm(
    models: dict[str, TextToImage], folders: dict[str, Path], clip_skip: int
) -> None:
    stock = stock_of(StableDiffusionPipeline, folders["1"])
    ids = stock.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = stock.text_encoder(ids, output_hidden_states=True).hidden_states
        assert len(states) == stock.text_encoder.config.num_hidden_layers + 1
        handed = stock.text_encoder.final_layer_norm(states[-(clip_skip + 1)])
        null = stock.text_encoder(stock.tokenizer([""] * 2, padding="max_length", return_tensors="pt").input_ids)[0]
    asked: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
    theirs = stock(prompt_embeds=handed, negative_prompt_embeds=null, latents=start(2, 1), **asked).images
    ours = models["1"](PROMPTS, seed=SEED, clip_skip=clip_skip, **asked).images
    assert apart(ours, theirs) <= LATENTS
    embedded = models["1"](prompt_embeds=handed, negative_prompt_embeds=null, seed=SEED, **asked).images
    assert apart(embedded, theirs) <= LATENTS


def test_clip_skip_has_an_end(models: dict[str, TextToImage]) -> None:
    with pytest.raises(ValueError, match="clip_skip=3 is out of range; give a whole number from 0 to 2"):
        models["1"](SHORT, clip_skip=3)


# --- what lies on disk -------------------------------------------------------------------------------------------


def test_what_we_save_stock_paints_the_same(
    models: dict[str, TextToImage], folders: dict[str, Path], tmp_path: Path
) -> None:
    for kind, model in models.items():
        folder = model.save(tmp_path / kind)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
        kept = json.loads((folders[kind] / "model_index.json").read_text())
        assert index == kept
        assert_same(model, stock_of(StableDiffusionPipeline, folder), PROMPTS, 1)
        again = TextToImage.from_pretrained(folder, device="cpu")
        before, after = (each(SHORT, seed=1, num_inference_steps=3, output_type="pt").images for each in (model, again))
        assert torch.equal(before, after)


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["1"], tmp_path / "model"))


def test_a_safety_checker_is_neither_loaded_nor_saved(copy: Path, tmp_path: Path) -> None:
    """Published 1.x folders list one, and its files are large; here they need not even be there."""
    listed = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    edited(copy / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"], **listed)
    model = TextToImage.from_pretrained(copy, device="cpu")
    saved = json.loads((model.save(tmp_path / "saved") / "model_index.json").read_text())
    assert saved["safety_checker"] == saved["feature_extractor"] == [None, None]
    assert not saved["requires_safety_checker"]


def test_weights_named_as_published_files_name_them(copy: Path, models: dict[str, TextToImage]) -> None:
    """Transformers 4 wrote `text_model.` before each name, and the positions; older autoencoders named attention so."""
    path = copy / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    assert not any(name.startswith("text_model.text_model.") for name in weights)
    weights["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(weights, path, metadata={"format": "pt"})
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, old in before.items():
        for name in [name for name in weights if f"attentions.0.{new}." in name]:
            weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    ours, again = (
        each(SHORT, seed=1, num_inference_steps=2, output_type="pt").images
        for each in (models["1"], TextToImage.from_pretrained(copy, device="cpu"))
    )
    assert torch.equal(ours, again)


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_weights_that_do_not_fit_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first five and how many more, whichever library reads them."""
    text, unet = copy / "text_encoder" / "model.safetensors", copy / "unet" / "diffusion_pytorch_model.safetensors"
    kept = {path: path.read_bytes() for path in (text, unet)}

    def refused(path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
        rewritten(path, change)
        with pytest.raises(ValueError, match=message) as caught:
            TextToImage.from_pretrained(copy, device="cpu")
        assert "\n" not in str(caught.value)
        path.write_bytes(kept[path])

    for path in kept:
        six = sorted(load_file(path))[:6]
        pattern = "is damaged: weights " + ", ".join(re.escape(name) for name in six[:5]) + " and 1 more are missing"
        refused(path, lambda weights, six=six: [weights.pop(name) for name in six], pattern)  # type: ignore[misc]
        misshaped = "is damaged: weights " + ", ".join(re.escape(f"{name} (3, 5)") for name in six[:5]) + " and 1 more"
        apart = dict.fromkeys(six, torch.zeros(3, 5))
        refused(
            path,
            lambda weights, apart=apart: weights.update({name: one.clone() for name, one in apart.items()}),  # type: ignore[misc]
            f"{misshaped} are of another shape",
        )
    norm = torch.zeros(3)
    refused(
        text, lambda weights: weights.update({"final_layer_norm.bias": norm}), r"norm.bias \(3,\) is of another shape"
    )
    rewritten(text, lambda weights: weights.update({"extra.weight": norm}))
    TextToImage.from_pretrained(copy, device="cpu")
    assert "weight extra.weight is not read" in caplog.text


def test_outdated_configurations_are_read_as_stock_reads_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    folder = make_tiny_stable_diffusion(tmp_path / "old", scheduler=DDIMScheduler(**betas))
    # stock's pipeline has put them right before it saved them
    edited(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert "steps_offset" in caplog.text and "clip_sample" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock says so too
        assert_same(model, stock_of(StableDiffusionPipeline, folder), PROMPTS, 1)
    edited(folder / "unet" / "config.json", sample_size=32, _diffusers_version="0.6.0")
    settings = TextToImage.from_pretrained(folder, device="cpu").model.abilities.defaults
    assert (settings.height, settings.width) == (512, 512)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "unet"),  # for inpainting; its weights are another shape
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder' is missing from model_index.json"),
        ("text_encoder/config.json", {"max_position_embeddings": 16}, "text_encoder"),
        ("scheduler/scheduler_config.json", {"skip_prk_steps": False}, "PNDMScheduler.* is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(copy: Path, name: str, change: dict[str, object], message: str) -> None:
    edited(copy / name, **change)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_info_tells_the_family(folders: dict[str, Path]) -> None:
    command = [str(Path(sys.executable).parent / "unclip"), "info", str(folders["2"])]
    ran = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["family"] == "StableDiffusionPipeline"
    assert set(facts["parts"]) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


# --- ranking by another CLIP -------------------------------------------------------------------------------------


def test_without_a_clip_it_paints_and_says_that_it_cannot_rank(models: dict[str, TextToImage]) -> None:
    asked: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 2, "seed": 3}
    for rerank in (None, False):
        result = models["1"](SHORT, rerank=rerank, **asked)
        assert result.scores is None and result.seeds == [3, 4]
    with pytest.raises(ValueError, match="has no clip/ to rank with; load it with clip=NAME") as caught:
        models["1"](SHORT, rerank=True, **asked)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"keep=1 of 2 needs .*; leave keep out, or load it with clip=NAME"):
        models["1"](SHORT, keep=1, **asked)


def test_a_clip_from_elsewhere_ranks_and_is_saved_beside(
    models: dict[str, TextToImage], folders: dict[str, Path], ranking_clip: Path, tmp_path: Path
) -> None:
    ranked = TextToImage.from_pretrained(folders["1"], device="cpu", clip=ranking_clip)
    asked: dict[str, Any] = {"num_images_per_prompt": 4, "num_inference_steps": 2, "seed": 3}
    result = ranked(SHORT, keep=2, search="best_of", **asked)
    plain = models["1"](SHORT, **asked)
    assert result.scores is not None and result.scores == sorted(result.scores, reverse=True)
    for seed, image in zip(result.seeds, result.images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(plain.images[seed - 3]))
    assert result.records[0]["clip"] == str(ranking_clip) and "clip" not in plain.records[0]
    # the record says by which CLIP a picture was guided
    guided = ranked.paint([Request(prompt=SHORT, clip_guidance_scale=5.0, num_inference_steps=2, seed=3)])[0]
    assert ranked.repaint(guided.records[0]).shape == (3, 64, 64)
    saved = TextToImage.from_pretrained(ranked.save(tmp_path / "saved"), device="cpu")
    again = saved(SHORT, keep=2, **asked)
    assert again.seeds == result.seeds and again.scores == pytest.approx(result.scores, abs=1e-5)
    with pytest.raises(ValueError, match=r"painted by CLIP .*, and this is the model's own"):
        saved.repaint({**guided.records[0], "model_hash": ""})
    with pytest.raises(ValueError, match="nowhere"):
        TextToImage.from_pretrained(folders["1"], device="cpu", clip=tmp_path / "nowhere")


def test_a_scheduler_of_another_kind_is_the_models_own(tmp_path: Path) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    folder = make_tiny_stable_diffusion(tmp_path / "euler", scheduler=EulerDiscreteScheduler(**betas))
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert model.model.abilities.defaults.sampler == "euler"
    assert_same_sampled(model, stock_of(StableDiffusionPipeline, folder), None)


def test_prompt_and_null_are_one_until_they_are_read(models: dict[str, TextToImage]) -> None:
    """Attention before the first text is computed once for both, whatever guidance other rows have."""
    seen: dict[str, list[int]] = {"attn1": [], "attn2": []}
    block = models["1"].model.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    hooks = [
        getattr(block, name).to_q.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(len(x[0])))
        for name in seen
    ]
    asked = {"prompt": "a star", "num_inference_steps": 2, "rerank": False}
    models["1"].paint([Request(seed=seed, guidance_scale=scale, **asked) for seed, scale in ((0, 5), (1, 1))])
    for hook in hooks:
        hook.remove()
    # however many rows a call has: of the guided one's two evaluations, one is computed there
    assert max(second - first for first, second in zip(*seen.values(), strict=True)) == 1
