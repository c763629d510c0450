"""What `unclip generate` refuses: in one line, with nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.damage import spoil
from tests.typed import PROMPT, refused

MISTAKES = {
    "unknown model": ("--model nowhere", "'nowhere' is unknown"),
    "model path without a model": ("--model /", "model_index.json"),
    "unknown hub id": ("--model nobody/nothing", "cannot be fetched"),
    "a file of another kind": ("--model pyproject.toml", "is not a .safetensors file"),
    "unknown sampler": ("--sampler eular", "sampler 'eular' is unknown; choose from: "),
    "keep more than n": ("-n 4 --keep 5", "--keep 5 is more than -n 4"),
    "keep none": ("--keep 0", "--keep 0 is out of range; give a whole number of 1 or more"),
    "paint none": ("-n 0", "-n 0 is out of range"),
    "no steps": ("--steps 0", "--steps 0 is out of range; give a whole number from 1 to 1000"),
    "too many steps": ("--steps 1001", "--steps 1001 is"),
    "no prior steps": ("--prior-steps 0", "--prior-steps 0 is"),
    "no layers left": ("--clip-skip 99", "--clip-skip 99 is out of range"),
    "no such noise": ("--noise-level -1", "--noise-level -1 is out of range"),
    "odd width": ("--width 60", "--width 60 cannot be halved into latents; give a multiple of 8"),
    "absurd width": ("--width 800000", "--width 800000 is out of range; give a whole number from 1 to 16384"),
    "no height": ("--height 0", "--height 0 is out of range"),
    "negative seed": ("--seed -1", "--seed -1 is out of range"),
    "too large a seed": ("--seed 4294967296", "--seed 4294967296 is out of range"),
    "guidance below one": ("--guidance 0.5", "--guidance 0.5 is out of range"),
    "guidance not a number": ("--guidance nan", "--guidance nan is"),
    "guidance beyond all numbers": ("-n 2 --guidance 1e38", "numbers that are not finite; lower --guidance 1e+38"),
    "eta above one": ("--eta 2", "--eta 2.0 is out of range; give a number from 0 to 1"),
    "unknown attention": ("--attention flsh", "attention 'flsh' is unknown; choose from: auto, sdpa, flash, cudnn"),
    "attention of another device": ("--attention cudnn", "attention 'cudnn' does not run in float32 on cpu"),
    "churn of another sampler": ("--sampler ddim --s-churn 1", "--s-churn 1.0, but sampler 'ddim' takes none"),
    "churn and eta": ("--sampler euler --eta 1 --s-churn 1", "--eta 1.0 and --s-churn 1.0 were both given"),
    "unknown rule": ("--guidance-rule apq", "--guidance-rule 'apq' is unknown; choose from: cfg, cfg_zero, apg"),
    "autoguidance alone": (
        "--guidance-rule autoguidance",
        "needs a weaker UNet; load the model with --weak-unet FOLDER",
    ),
    "weaker network that is not there": ("--weak-unet nowhere", "--weak-unet: folder 'nowhere' does not exist"),
    "network for drafts that is not there": ("--draft-unet nowhere", "--draft-unet: folder 'nowhere' does not exist"),
    "a scale that is none": ("--lora bad.safetensors:x", "--lora 'bad.safetensors:x': 'x' is no scale; give a number"),
    "an adapter's scale that is none": ("--ip-adapter a.safetensors:2,5 --ip-image a.png", "'2,5' is no scale"),
    "an adapter without a picture": ("--ip-adapter a.safetensors", "--ip-adapter and --ip-image go together"),
    "a colon of the path's own": ("--lora bad:folder/a.safetensors", "LoRA 'bad:folder/a.safetensors' "),
    "rule's number": ("--guidance-rule apg --apg-eta 2", "--apg-eta 2.0 is out of range; give a number from 0 to 1"),
    "interval upside down": ("--guidance-interval 3 1", "--guidance-interval (3.0, 1.0) is upside down"),
    "strength alone": ("--strength 0.5", "--strength was given without --image; give the picture as well"),
    "steps in words": ("--steps many", "--steps"),
    "unknown option": ("--stpes 3", "--stpes"),
}


@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_writes_nothing(
    options: str, words: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    message = refused(capsys, "generate", PROMPT, "--model", tiny_folder, "--out", out, *options.split(), "--json")
    assert words in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prompt", ["", "  \t\n"])
def test_an_empty_prompt_is_refused(
    prompt: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "generate", prompt, "--model", tiny_folder, "--out", tmp_path / "out")
    assert "prompt is empty" in message and not (tmp_path / "out").exists()
    assert "PROMPT" in refused(capsys, "generate", "--out", tmp_path / "out")
    latin = os.fsdecode(b"ein gr\xfcner Kreis")  # as Python holds bytes that are not UTF-8
    assert "UTF-8" in refused(capsys, "generate", latin, "--model", tiny_folder, "--out", tmp_path / "out")
    assert "UTF-8" in refused(capsys, "generate", PROMPT, "--sampler", latin, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "how",
    [
        "model_index.json missing",
        "model_index.json damaged",
        "unet missing",
        "unet/diffusion_pytorch_model.safetensors missing",
        "unet/diffusion_pytorch_model.safetensors cut",
        "vae/config.json damaged",
        "clip/model.safetensors cut",
        "scheduler/scheduler_config.json missing",
        "unclip.json damaged",
    ],
)
def test_a_damaged_model_is_named(
    how: str, own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = spoil(own_folder, how)
    message = refused(capsys, "generate", PROMPT, "--model", own_folder, "--out", tmp_path / "out")
    part = how.partition(" ")[0].partition("/")[0]
    assert name in message or part in message
    assert not (tmp_path / "out").exists()
