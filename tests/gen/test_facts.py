"""What `info` tells: read from headers and configurations alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clip_core.weights import read_json
from gen.cli import info
from gen.facts import facts_of, tower, whole_clip
from tests.tiny import make_tiny_clip, make_tiny_siglip


def test_towers_texts_schedulers_and_licence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "LICENSE.md").write_text("\n# CreativeML Open RAIL-M\n\nand so on\n")
    facts = facts_of(str(folder))["told"]
    assert facts["text_encoder"] == "quick_gelu, width 16, 2 layers"
    assert facts["clip"] == "clip, embedding of 16"
    assert facts["tokenizer"] == "32 tokens"
    assert facts["scheduler"].startswith("DDIMScheduler, prediction_type v_prediction, timestep_spacing trailing")
    assert facts["licence"] == "# CreativeML Open RAIL-M (LICENSE.md)"
    info(str(folder))
    printed = capsys.readouterr().out
    for name, what in facts.items():
        assert f"{name}: {what}" in printed


@pytest.mark.parametrize(
    ("kind", "sizes", "sees", "fact"),
    [
        ("CLIPTextModel", (768, 12), False, "CLIP L: gelu, width 768, 12 layers"),
        ("CLIPTextModel", (1024, 23), False, "OpenCLIP H: gelu, width 1024, 23 layers"),
        ("CLIPTextModelWithProjection", (1280, 32), False, "OpenCLIP bigG: gelu, width 1280, 32 layers"),
        ("CLIPVisionModelWithProjection", (1280, 32), True, "OpenCLIP H: gelu, width 1280, 32 layers"),
        ("CLIPVisionModelWithProjection", (1024, 24), True, "CLIP L: gelu, width 1024, 24 layers"),
        ("MultilingualCLIP", (1024, 24), False, "MultilingualCLIP: gelu, width 1024, 24 layers"),
        ("CLIPTextModel", (16, 2), False, "gelu, width 16, 2 layers"),
    ],
)
def test_published_towers_are_known_by_their_sizes(kind: str, sizes: tuple[int, int], sees: bool, fact: str) -> None:
    config = {"hidden_size": sizes[0], "num_hidden_layers": sizes[1], "hidden_act": "gelu"}
    assert tower(kind, config, sees) == fact


def test_what_ranks_is_told(tmp_path: Path) -> None:
    for write, fact in ((make_tiny_clip, "clip, embedding of 16"), (make_tiny_siglip, "siglip, embedding of 16")):
        assert whole_clip(read_json(write(tmp_path / fact) / "config.json")) == fact
    openai = {"model_type": "clip", "projection_dim": 768, "text_config": {"hidden_size": 768}}
    assert whole_clip(openai) == "CLIP L, embedding of 768"


def test_no_weight_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    """A file with its header alone tells as much as a whole one."""
    whole = facts_of(str(tiny_folder))
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[8 + int.from_bytes(blob[:8], "little") :] = bytes(len(blob) - 8 - int.from_bytes(blob[:8], "little"))
    path.write_bytes(blob)
    facts = facts_of(str(folder))
    assert facts["parts"] == whole["parts"] and facts["hash"] != whole["hash"]


@pytest.mark.parametrize("part", ["vae", "clip", "text_encoder"])
def test_weights_that_are_missing_are_told(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (path,) = (folder / part).glob("*.safetensors")
    path.unlink()
    with pytest.raises(ValueError, match=f"model part '.*{part}' has no .safetensors file; fetch it again"):
        facts_of(str(folder))
