"""benchmarks/search.py: it pairs what it compares, and keeps what it found."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        yield importlib.import_module("search")
    finally:
        del sys.modules["search"]


def test_it_runs_and_keeps_its_numbers(
    bench: Any, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    ways = ["draft", "racing"]
    bench.main(["four-of-16"], ways, prompts=2, repeats=1, model=str(tiny_folder), device="cpu", result=path)
    found = json.loads(path.read_text())
    assert found["machine"] and found["versions"] and list(found["tasks"]) == ["four-of-16"]
    told = found["tasks"]["four-of-16"]["ways"]
    assert list(told) == ["best_of", "draft", "racing"]
    assert all(len(each["turns"]) == 2 for each in told.values())
    assert told["best_of"]["score_interval"] == [0, 0] and told["best_of"]["times_faster"] == 1
    assert told["draft"]["score_difference"] <= 1e-3  # of the same candidates, none better can be kept
    assert told["draft"]["turns"][0]["decoder_evaluations"] < told["best_of"]["turns"][0]["decoder_evaluations"]
    assert capsys.readouterr().out.count("\n| ") == 4


def test_differences_are_paired(bench: Any) -> None:
    exact = [bench.Turn(2.0, 0.1 * k, 0, 0, 0, 0) for k in range(20)]
    ours = [bench.Turn(1.0, 0.1 * k - 0.01, 0, 0, 0, 0) for k in range(20)]
    told = bench.beside(ours, exact)
    assert told["score_difference"] == pytest.approx(-0.01) and told["times_faster"] == 2
    assert told["score_interval"] == pytest.approx([-0.01, -0.01]) and not told["not_worse"]
