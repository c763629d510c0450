"""benchmarks/prior.py: both loops end alike, and it keeps what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prior


def test_it_runs_and_keeps_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"layers": 2, "heads": 2, "head_width": 8, "embedding_width": 16, "text_tokens": 12}
    asked: dict[str, Any] = {"candidates": [1, 3], "prompts": 2, "steps": 3, "repeats": 2, "device": "cpu"}
    with torch.random.fork_rng(devices=[]):
        prior.main(**sizes, **asked, result=tmp_path / "prior.json")
    found = json.loads((tmp_path / "prior.json").read_text())
    assert found["sizes"].items() > sizes.items() and found["machine"] and found["versions"]
    for one in found["measured"]:
        assert one["max_difference"] < 1e-5 < one["largest"]
        assert [len(seconds) for seconds in one["seconds"].values()] == [2, 2]
    assert capsys.readouterr().out.count("\n| ") == 3  # the heading and two rows
