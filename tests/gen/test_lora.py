"""LoRAs of every layout: the merged weights by hand, stock diffusers' pictures, and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from gen import TextToImage, command
from gen.picture import read_png
from tests.lora import ALPHA, RANK, SCALE, loaded, pairs_of, weights_of, write
from tests.stock import LATENTS, PROMPTS, SEED, SHORT, apart, assert_same, start, stock_of
from tests.tiny import make_tiny_stable_unclip


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("1", "peft"), ("1", "kohya"), ("1", "processors"), ("xl", "peft"), ("xl", "kohya"), ("xl", "stability")],
)
def test_merged_weights_by_hand(
    stable_diffusion_folders: dict[str, Path], tmp_path: Path, kind: str, layout: str
) -> None:
    model = loaded(stable_diffusion_folders[kind])
    pairs = pairs_of(model.model)
    assert {part for part, _ in pairs} == {"unet", "text_encoder"} | ({"text_encoder_2"} if kind == "xl" else set())
    before = weights_of(model)
    model.load_lora(write(tmp_path / "a.safetensors", layout, pairs), SCALE)
    after = weights_of(model)
    weight = SCALE * (1.0 if layout == "processors" else ALPHA / RANK)
    for layer, (down, up) in pairs.items():
        part, name = layer
        key = (part, f"{name}.weight")
        expected = torch.einsum("or,ri...->oi...", up.flatten(1), down) * weight
        torch.testing.assert_close(after[key] - before[key], expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 1e-2
        before[key] = after[key]
    assert all(torch.equal(after[key], before[key]) for key in before)  # no other weight moved


def test_what_is_saved_stock_paints_the_same(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    model, plain = loaded(stable_diffusion_folders["1"]), loaded(stable_diffusion_folders["1"])
    path = write(tmp_path / "a.safetensors", "kohya", pairs_of(model.model))
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 5, "output_type": "latent"}
    before = model(SHORT, **asked).images  # and what it keeps of texts must not outlive the merge
    model.load_lora(path, SCALE)
    after = model(SHORT, **asked).images
    assert torch.equal(before, plain(SHORT, **asked).images) and apart(after, before) > 1e-2
    assert_same(model, stock_of(StableDiffusionPipeline, model.save(tmp_path / "saved")), PROMPTS, 1)


@pytest.mark.parametrize(("kind", "layout"), [("1", "peft"), ("1", "kohya"), ("xl", "peft"), ("xl", "kohya")])
def test_stock_diffusers_fuses_the_same(
    stable_diffusion_folders: dict[str, Path], tmp_path: Path, kind: str, layout: str
) -> None:
    pytest.importorskip("peft")
    model = loaded(stable_diffusion_folders[kind])
    path = write(tmp_path / "a.safetensors", layout, pairs_of(model.model))
    stock = stock_of(
        {"1": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}[kind], stable_diffusion_folders[kind]
    )
    stock.load_lora_weights(path.parent, weight_name=path.name)
    stock.fuse_lora(lora_scale=SCALE)
    model.load_lora(path, SCALE)
    asked: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
    theirs = stock(PROMPTS, latents=start(2, 1), **asked).images
    assert apart(model(PROMPTS, seed=SEED, **asked).images, theirs) <= LATENTS


def test_a_tower_that_clip_shares_is_copied_first(tmp_path: Path) -> None:
    """What ranks, and what the prior reads, stay as they were."""
    model = loaded(make_tiny_stable_unclip(tmp_path / "model"))
    clip, prior = model.model.clip, model.model.prior
    assert clip is not None and prior is not None and model.model.text.encoder is clip.model.text_model
    texts = model.model.text([SHORT]).tokens, clip.text(SHORT).embedding, prior.text([SHORT]).tokens
    model.load_lora(write(tmp_path / "a.safetensors", "kohya", pairs_of(model.model)))
    torch.testing.assert_close(clip.text(SHORT).embedding, texts[1])
    torch.testing.assert_close(prior.text([SHORT]).tokens, texts[2])
    assert (model.model.text([SHORT]).tokens - texts[0]).abs().max() > 1e-2


def test_several_add_up_and_half_precision_stays(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(stable_diffusion_folders["1"], device="cpu", dtype=torch.float16)
    path = write(tmp_path / "a.safetensors", "kohya", pairs_of(model.model, only="attn1"))
    before = weights_of(model)
    model.load_lora(path, 2.0)
    model.load_lora(tmp_path, -2.0)  # the only file of its folder
    after = weights_of(model)
    assert all(value.dtype == torch.float16 for value in after.values() if value.is_floating_point())
    assert max(float((after[key] - before[key]).abs().max()) for key in before) < 1e-2
    assert [each.scale for each in model.adapters] == [2.0, -2.0]


def test_the_command_line_and_its_record(
    stable_diffusion_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.safetensors", "peft", pairs_of(loaded(stable_diffusion_folders["1"]).model))
    arguments = ["generate", SHORT, "-n", "1", "--steps", "2", "--model", str(stable_diffusion_folders["1"]), "--quiet"]
    arguments += ["--lora", f"{path}:0.5", "--lora", str(path), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    picture = Path(capsys.readouterr().out.strip())
    record = read_png(picture)[1]
    adapters = record["adapters"]
    assert [(each["kind"], each["name"], each["scale"]) for each in adapters] == [
        ("lora", str(path), 0.5),
        ("lora", str(path), 1.0),
    ]
    assert command.main(["reproduce", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] <= 1
    model = loaded(stable_diffusion_folders["1"])
    with pytest.raises(
        ValueError, match=r"was painted with other adapters: lora '.*' x 0.5 .*; here are none"
    ) as error:
        model.repaint(record)
    assert "\n" not in str(error.value)
    for damaged in ({}, [{}], [{"kind": "lora", "name": "a", "hash": "b", "scale": "1"}]):
        with pytest.raises(ValueError, match="the record is damaged: its adapters"):
            model.load_again({"adapters": damaged})
    with pytest.raises(ValueError, match="an adapter of kind 'tune', which is not known here"):
        model.load_again({"adapters": [adapters[0] | {"kind": "tune"}]})
    write(path, "peft", {layer: (down * 2, up) for layer, (down, up) in pairs_of(model.model).items()})
    assert command.main(["reproduce", str(picture)]) == 2  # another file of that name
    assert "was painted with other adapters" in capsys.readouterr().err
