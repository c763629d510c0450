"""benchmarks/arrivals.py: it measures both ways, and its static batches are what one call of a pipeline can paint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import arrivals
from gen import Request


def test_it_runs_and_keeps_its_numbers(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrivals.main(str(tiny_folder), 4, 2.0, 1.5, 2, 2, "cpu", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"] and found["versions"]
    assert list(found["runs"]) == ["static", "in flight", "in flight, 1.5 times the rate"]
    for runs in found["runs"].values():
        assert len(runs) == 2
        for each in runs:
            assert all(value > 0 for value in each.values()) and len(each) == 3
    out = capsys.readouterr().out
    assert out.count("\n| ") == 4  # the heading and three rows
    assert out.count("times static's pictures a second") == 2


def test_a_static_batch_is_of_one_kind() -> None:
    """The oldest, and what one call of a pipeline can paint beside it without waste."""
    first = Request(num_images_per_prompt=2, sampler="ddim", num_inference_steps=8, guidance_scale=3.0)
    longer, unguided = replace(first, num_inference_steps=9), replace(first, guidance_scale=1.0)
    waiting = [
        first,
        longer,
        replace(first, guidance_scale=5.0),
        unguided,
        replace(first, sampler="heun"),
        first,
        first,
    ]
    assert arrivals.batch_of(waiting, 16) == [0, 5, 6]
    assert arrivals.batch_of(waiting, 5) == [0, 5]
    assert arrivals.batch_of(waiting[1:], 1) == [0]
