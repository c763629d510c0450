"""Configurations and machines that a model does not fit are refused before any memory is taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen import Request, TextToImage, room
from gen.weights import numbers
from tests.stock import edited
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_unclip
from tests.tiny_kandinsky import make_tiny_kandinsky


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("room") / "tiny")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "unet",
            {"block_out_channels": [8, 10**9]},
            "unet' asks for block_out_channels=1000000000 in its configuration",
        ),
        (
            "unet",
            {"layers_per_block": 10**6},
            "unet' asks for layers_per_block=1000000 in its configuration; give 1000",
        ),
        ("unet", {"block_out_channels": [80_000, 160_000]}, r"unet' asks for [\d,]{13,} numbers .* its files hold"),
        ("unet", {"layers_per_block": [1, [10**9]]}, "unet' asks for layers_per_block=1000000000 in its configuration"),
        ("unet", {"sample_size": 900_000}, "unet' asks for sample_size=900000 in its configuration; give 16384 at"),
        ("scheduler", {"num_train_timesteps": 10**12}, "scheduler' asks for num_train_timesteps=1000000000000 in its"),
        ("text_encoder", {"hidden_size": 800_000}, r"text_encoder' asks for [\d,]{13,} numbers .* its files hold"),
    ],
)
def test_absurd_sizes(folder: Path, tmp_path: Path, part: str, change: dict[str, object], message: str) -> None:
    """Terabytes, which a machine would have to be asked for."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    edited(copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **change)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_machine_without_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = sum(numbers(folder / part) for part in ("unet", "vae", "text_encoder"))
    monkeypatch.setattr(room, "free_memory", lambda device: 2 * held)
    with pytest.raises(ValueError, match=r"needs 0\.\d GB for its weights in float32, and 0\.\d GB are free on cpu"):
        TextToImage.from_pretrained(folder, device="cpu")
    TextToImage.from_pretrained(folder, device="cpu", dtype=torch.float16)


def test_what_is_stored_twice_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_stable_unclip(tmp_path / "tiny")
    twice = ("text_encoder", "prior_text_encoder")
    needed = 4 * sum(numbers(path) for path in folder.iterdir() if path.is_dir() and path.name not in twice)
    monkeypatch.setattr(room, "free_memory", lambda device: needed)
    TextToImage.from_pretrained(folder, device="cpu")
    monkeypatch.setattr(room, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match="are free on cpu"):
        TextToImage.from_pretrained(folder, device="cpu")


def test_a_prior_of_its_own_folder_needs_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = make_tiny_kandinsky(tmp_path, "2.2")
    decoder, prior = (
        sum(numbers(path) for path in of[name].iterdir() if path.is_dir()) for name in ("decoder", "prior")
    )
    monkeypatch.setattr(room, "free_memory", lambda device: 4 * (decoder + prior))
    TextToImage.from_pretrained(of["decoder"], device="cpu", prior_model=of["prior"])
    monkeypatch.setattr(room, "free_memory", lambda device: 4 * (decoder + prior) - 1)
    with pytest.raises(ValueError, match="are free on cpu"):
        TextToImage.from_pretrained(of["decoder"], device="cpu", prior_model=of["prior"])


def test_a_picture_without_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextToImage.from_pretrained(folder, device="cpu")
    vae, unet = model.model.parts()["vae"].config.block_out_channels[0], model.model.unet.config.block_out_channels[0]
    least, latent = 4 * 2 * vae * 96 * 128, 4 * 2 * unet * (96 // 2) * (128 // 2)
    asked = {"height": 96, "width": 128, "num_inference_steps": 1}
    free = [least - 1]
    monkeypatch.setattr(room, "free_memory", lambda device: free[0])
    monkeypatch.setattr(room, "reserve", lambda: 0)
    message = (
        r"a picture of height 96 and width 128 needs 0\.\d GB at the very least, and 0\.\d GB are free on cpu; give"
    )
    with pytest.raises(ValueError, match=message):
        model("a star", **asked)
    with model.engine() as engine, pytest.raises(ValueError, match=message):
        engine.submit(Request(prompt="a star", **asked))
    with pytest.raises(ValueError, match=message):
        model.paint([Request(prompt="a star"), Request(prompt="a star", **asked)])
    monkeypatch.setattr(room, "reserve", lambda: 1)
    assert model("a star", **asked).seeds
    free[0] = latent
    monkeypatch.setattr(room, "reserve", lambda: 0)
    assert model("a star", output_type="latent", **asked).seeds


def test_less_is_asked_than_is_held_at_once_in_fact(folder: Path) -> None:
    model = TextToImage.from_pretrained(folder, device="cpu").model
    largest = 0

    def note(module: torch.nn.Module, given: tuple[object, ...], answer: object) -> None:
        nonlocal largest
        if given and isinstance(given[0], torch.Tensor) and isinstance(answer, torch.Tensor):
            largest = max(largest, given[0].numel() + answer.numel())

    for module in (*model.unet.modules(), *model.parts()["vae"].modules()):
        module.register_forward_hook(note)
    TextToImage(model)("a star", height=96, width=128, num_inference_steps=1, guidance_scale=1.0)
    settings = replace(model.abilities.defaults, height=96, width=128)
    latent, decoded = (model.held_at_once(settings, is_decoded) for is_decoded in (False, True))
    assert 0 < latent <= decoded <= largest
