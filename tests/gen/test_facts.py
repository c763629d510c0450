"""What `info` tells: read from headers and configurations alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gen.cli import info
from gen.facts import facts_of


def test_towers_texts_schedulers_and_licence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "LICENSE.md").write_text("\n# CreativeML Open RAIL-M\n\nand so on\n")
    told = facts_of(str(folder))["told"]
    assert told["text_encoder"] == "quick_gelu, width 16, 2 layers"
    assert told["clip"] == "clip, embedding of 16"
    assert told["tokenizer"] == "32 tokens"
    assert told["scheduler"].startswith("DDIMScheduler, prediction_type v_prediction, timestep_spacing trailing")
    assert told["licence"] == "# CreativeML Open RAIL-M (LICENSE.md)"
    info(str(folder))
    printed = capsys.readouterr().out
    for name, what in told.items():
        assert f"{name}: {what}" in printed


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
