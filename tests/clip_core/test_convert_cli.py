"""`unclip convert`: there and back as typed, and the folder in a stock diffusers pipeline."""

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from clip_core.clip import CLIP
from gen import command, convert_cli
from tests.tiny import make_tiny_clip, stable_diffusion_scheduler, tiny_unet, tiny_vae

ROOT = Path(__file__).resolve().parents[2]
LENGTH, WIDTH = 20, 24
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": WIDTH, "heads": 3, "layers": 2},
}


def convert(*arguments: str | Path) -> int:
    """The verb as the package declares it, whichever version of it is installed."""
    verbs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][command.GROUP]
    (where,) = (value for name, value in verbs.items() if name.startswith("convert: "))
    entry = EntryPoint("convert: converts", where, command.GROUP)
    return command._run(command.Verb("convert", "converts", entry), [str(argument) for argument in arguments])


def write(folder: Path, config: dict) -> Path:
    """An open_clip folder with open_clip's own tokenizer, weights large enough that a wrong place shows."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    for weight in (weight for name, weight in model.named_parameters() if name != "logit_scale"):
        nn.init.normal_(weight, std=0.3)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("clips") / "open_clip", CONFIG)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "transformers"
    assert convert(folder, out, "--json") == 0
    return out


def test_there_and_back(folder: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert convert(converted, tmp_path / "back", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["library"] == "open_clip" and answer["exact"] and answer["largest_difference"] < 1e-5
    before = load_file(folder / "open_clip_model.safetensors")
    after = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_one_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = make_tiny_clip(tmp_path / "clip")
    capsys.readouterr()
    assert convert(clip, tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "a CLIP of open_clip, which says the same" in printed.out and "%" not in printed.err
    assert isinstance(CLIP.from_pretrained(tmp_path / "out").model, open_clip.CLIP)


@torch.no_grad()
def test_stock_diffusers_paints_from_the_folder_what_open_clip_says(folder: Path, converted: Path) -> None:
    prompts = ["a small red circle", "naïve café! left of right " * 9]
    torch.manual_seed(1)
    stock = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel.from_pretrained(converted),
        tokenizer=CLIPTokenizer.from_pretrained(converted),
        unet=tiny_unet(class_width=None, cross_attention_dim=WIDTH),
        scheduler=stable_diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
    asked["latents"] = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    ours = CLIP.from_pretrained(folder)  # the states that open_clip itself computes
    handed = {"prompt_embeds": ours.text(prompts).tokens, "negative_prompt_embeds": ours.text(["", ""]).tokens}
    read, given = stock(prompts, **asked).images, stock(**handed, **asked).images
    assert (read - given).abs().max() <= 1e-4 * given.abs().max()
    other = stock(prompts[::-1], **asked).images
    assert (other - given).abs().max() > 1e-2 * given.abs().max()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    resnet = write(tmp_path / "resnet", CONFIG | {"vision_cfg": vision})
    for source, out, message in (
        (folder, folder, "is there already and not empty; give a new folder"),
        (tmp_path / "nothing", tmp_path / "out", "is no folder; give a CLIP folder"),
        (resnet, tmp_path / "out", "cannot be converted exactly: its image tower is a ModifiedResNet and no Vision"),
    ):
        assert convert(source, out) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()
    # it ranks all the same
    assert CLIP.from_pretrained(resnet).score(torch.rand(1, 3, 40, 40), "a star").isfinite().all()


def test_another_answer_is_exit_status_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_cli, "EXACT", -1.0)
    assert convert(folder, tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "says something else" in printed.out and "%" not in printed.err
