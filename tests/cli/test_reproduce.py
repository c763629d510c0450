"""`unclip reproduce`: the same picture from its record, or why it cannot be painted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gen import command
from gen.picture import read_png
from tests.tiny import make_tiny_clip, make_tiny_stable_unclip
from tests.typed import PROMPT, answer, refused


def rewrite(source: Path, target: Path, record: dict[str, Any], picture: Image.Image | None = None) -> Path:
    """A picture, that of `source` unless another is given, with this record."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("unclip", json.dumps(record))
    (picture or Image.open(source)).save(target, pnginfo=chunks)
    return target


def test_reproduce_paints_the_same_picture(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = answer(capsys, "reproduce", best)
    assert printed["reproduced"] is True and printed["largest_difference"] <= 1
    assert printed["record"]["prompt"] == PROMPT
    assert command.main(["reproduce", str(best)]) == 0
    assert "largest pixel difference" in capsys.readouterr().out


def test_reproduce_finds_a_changed_picture(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, record = read_png(best)
    pixels = np.asarray(picture).copy()
    pixels[3, 5, 1] = (int(pixels[3, 5, 1]) + 100) % 256
    changed = rewrite(best, tmp_path / "changed.png", record, Image.fromarray(pixels))
    printed = answer(capsys, "reproduce", changed, status=1)
    assert printed["reproduced"] is False and printed["largest_difference"] >= 100
    other = rewrite(changed, tmp_path / "seed.png", record | {"seed": record["seed"] + 1})
    printed = answer(capsys, "reproduce", other, status=1)
    assert printed["largest_difference"] > 1, "another seed is another picture"


def test_reproduce_computes_as_it_was_painted(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, record = read_png(best)
    assert (record["dtype"], record["attention"]) == ("float32", "auto")
    lower = rewrite(best, tmp_path / "lower.png", record | {"dtype": "bfloat16"})
    assert answer(capsys, "reproduce", lower, status=1)["largest_difference"] > 1  # it was float32
    other = rewrite(best, tmp_path / "other.png", record | {"attention": "math"})
    assert answer(capsys, "reproduce", other)["reproduced"] is True
    elsewhere = rewrite(best, tmp_path / "elsewhere.png", record | {"attention": "cudnn"})
    assert command.main(["reproduce", str(elsewhere)]) == 0
    assert "attention 'cudnn' does not run here" in capsys.readouterr().err


def test_reproduce_follows_precision_and_runtime(
    best: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", PROMPT, "-n", "1", "--no-rerank", "--steps", "2", "--dtype", "bfloat16"]
    printed = answer(capsys, *asked, "--model", tiny_folder, "--out", tmp_path / "half")
    half = Path(printed["pictures"][0]["path"])
    _, record = read_png(half)
    assert (record["dtype"], record["runtime"]) == ("bfloat16", "torch")
    assert answer(capsys, "reproduce", half)["reproduced"] is True
    unknown = rewrite(half, tmp_path / "unknown.png", record | {"runtime": "onnx"})
    assert "runtime 'onnx' is unknown" in refused(capsys, "reproduce", unknown)
    elsewhere = rewrite(best, tmp_path / "elsewhere.png", read_png(best)[1] | {"runtime": "openvino"})
    assert answer(capsys, "reproduce", elsewhere, "--runtime", "torch")["reproduced"] is True


def test_reproduce_asks_for_the_clip_that_painted(
    best: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in ((3, "clip"), (3, "moved"), (4, "other")):
        make_tiny_clip(tmp_path / name, seed=seed)
    asked = ["generate", PROMPT, "-n", "1", "--steps", "2", "--model", tiny_folder, "--clip", tmp_path / "clip"]
    guided = ["--clip-guidance-scale", "5", "--out", tmp_path / "guided"]
    picture = Path(answer(capsys, *asked, *guided)["pictures"][0]["path"])
    assert answer(capsys, "reproduce", picture)["reproduced"] is True
    (tmp_path / "clip").rename(tmp_path / "gone")
    assert "is no folder; give a CLIP folder" in refused(capsys, "reproduce", picture)
    assert answer(capsys, "reproduce", picture, "--clip", tmp_path / "moved")["reproduced"] is True
    assert "painted by CLIP" in refused(capsys, "reproduce", picture, "--clip", tmp_path / "other")
    message = refused(capsys, "reproduce", best, "--clip", tmp_path / "moved")
    assert "CLIP ranked" in message and "leave it out" in message
    ranked = Path(answer(capsys, *asked[:-1], tmp_path / "moved", "--out", tmp_path / "ranked")["pictures"][0]["path"])
    (tmp_path / "moved").rename(tmp_path / "lost")
    assert answer(capsys, "reproduce", ranked)["reproduced"] is True  # which no CLIP painted


def test_reproduce_refuses_what_it_cannot_repaint(
    painted: Path, best: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, record = read_png(best)
    assert "does not exist" in refused(capsys, "reproduce", tmp_path / "none.png")
    assert "holds no unclip record" in refused(capsys, "reproduce", painted / "sheet.png")
    for name in ("prompt", "seed", "settings", "model", "model_hash"):
        lacking = {key: value for key, value in record.items() if key != name}
        message = refused(capsys, "reproduce", rewrite(best, tmp_path / f"no-{name}.png", lacking))
        assert f"no {name}" in message or f"no '{name}'" in message
        assert message.count(f"no-{name}.png") == 1, "it says which file's record that is, once"
    for name, damage in (
        *(("settings", [1]), ("weak_unet", 3), ("clip", {}), ("clip_hash", 1), ("noise_path", 7)),
        *(("attention", 5), ("dtype", "float3"), ("runtime", 2)),
    ):
        message = refused(capsys, "reproduce", rewrite(best, tmp_path / f"{name}.png", record | {name: damage}))
        assert "is damaged: its " in message
    later = rewrite(best, tmp_path / "later.png", record | {"version": 2})
    assert "the record is of version 2, and here 1 is the last" in refused(capsys, "reproduce", later)
    gone = rewrite(best, tmp_path / "gone.png", record | {"model": "nowhere"})
    assert "'nowhere' is unknown" in refused(capsys, "reproduce", gone)
    assert answer(capsys, "reproduce", gone, "--model", tiny_folder)["reproduced"] is True
    other = make_tiny_stable_unclip(tmp_path / "other", seed=1)
    assert "hash" in refused(capsys, "reproduce", best, "--model", other)
    (tmp_path / "cut.png").write_bytes(best.read_bytes()[:400])
    assert "cannot be read" in refused(capsys, "reproduce", tmp_path / "cut.png")
