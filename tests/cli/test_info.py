"""`unclip info`: what a model is made of, and what its card tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from gen import command
from gen.picture import read_png
from tests.cli.damage import spoil
from tests.stock import edited
from tests.typed import answer, refused


def test_info_counts_what_the_files_hold(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = answer(capsys, "info", tiny_folder)
    assert facts["family"] == "StableUnCLIPPipeline"
    for part in ("unet", "vae", "prior", "text_encoder", "clip"):
        (file,) = (tiny_folder / part).glob("*.safetensors")
        assert facts["parts"][part]["parameters"] == sum(t.numel() for t in load_file(file).values())
    assert facts["parameters"] == sum(part["parameters"] for part in facts["parts"].values())
    assert facts["bytes"] == sum(path.stat().st_size for path in tiny_folder.rglob("*") if path.is_file())
    assert facts["parts"]["scheduler"]["parameters"] == 0


def test_info_tells_what_the_card_tells(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"one object right": {"all": 0.97, "best of 16": 0.99}}
    training = {"clip": {"recipe": "shapes/clip.yaml", "hardware": "2 cores", "seconds": 3600}}
    edited(own_folder / "unclip.json", scores=scores, training=training)
    assert command.main(["info", str(own_folder)]) == 0
    text = capsys.readouterr().out
    for word in ("unet", "parameters", "shapes/clip.yaml", "2 cores", "3600", "best of 16: 0.99", "knows"):
        assert word in text
    assert answer(capsys, "info", own_folder)["card"]["training"] == training


def test_info_and_the_pictures_name_one_hash(best: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "info", tiny_folder)["hash"] == read_png(best)[1]["model_hash"]


def test_parts_that_nothing_uses_are_in_no_hash(
    tiny_folder: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(own_folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    (own_folder / "feature_extractor").mkdir()
    (own_folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    facts = answer(capsys, "info", own_folder)
    assert facts["hash"] == answer(capsys, "info", tiny_folder)["hash"] and "feature_extractor" not in facts["parts"]


def test_info_refuses_unknown_and_damaged_models(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nowhere' is unknown" in refused(capsys, "info", "nowhere")
    spoil(own_folder, "unet/diffusion_pytorch_model.safetensors cut")
    assert "unet" in refused(capsys, "info", own_folder)
    spoil(own_folder, "unet missing")
    assert f"'{own_folder / 'unet'}' is missing" in refused(capsys, "info", own_folder)
    spoil(own_folder, "model_index.json damaged")
    assert "model_index.json" in refused(capsys, "info", own_folder)
