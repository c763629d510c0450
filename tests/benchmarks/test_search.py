"""benchmarks/search.py: it pairs what it compares, and keeps what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import search


def test_it_runs_and_keeps_its_numbers(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    ways = ["draft", "racing"]
    asked = {"prompts": 3, "together": 2, "model": str(tiny_folder), "device": "cpu"}
    search.main(["four-of-16"], ways, repeats=1, runtime="torch", dtype="float32", result=path, **asked)
    found = json.loads(path.read_text())
    assert found["machine"] and found["versions"] and list(found["tasks"]) == ["four-of-16"]
    measured = found["tasks"]["four-of-16"]["ways"]
    assert list(measured) == ["best_of", "draft", "racing"]
    assert all(len(each["turns"]) == 3 for each in measured.values())
    assert measured["best_of"]["score_interval"] == [0, 0] and measured["best_of"]["times_faster"] == 1
    assert measured["draft"]["score_difference"] <= 1e-3  # of the same candidates, none better can be kept
    assert measured["draft"]["turns"][0]["decoder_evaluations"] < measured["best_of"]["turns"][0]["decoder_evaluations"]
    assert capsys.readouterr().out.count("\n| ") == 4


def test_differences_are_paired() -> None:
    exact = [search.Turn(2.0, 0.1 * k, 0, 0, 0, 0) for k in range(20)]
    ours = [search.Turn(1.0, 0.1 * k - 0.01, 0, 0, 0, 0) for k in range(20)]
    measured = search.beside(ours, exact)
    assert measured["score_difference"] == pytest.approx(-0.01) and measured["times_faster"] == 2
    assert measured["score_interval"] == pytest.approx([-0.01, -0.01]) and not measured["not_worse"]
