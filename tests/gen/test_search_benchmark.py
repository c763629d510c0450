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
    yield from script("search", monkeypatch)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from script("looks", monkeypatch)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        yield importlib.import_module(name)
    finally:
        del sys.modules[name]


def test_it_runs_and_keeps_its_numbers(
    bench: Any, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    ways = ["draft", "racing"]
    asked = {"prompts": 3, "together": 2, "model": str(tiny_folder), "device": "cpu"}
    bench.main(["four-of-16"], ways, repeats=1, runtime="torch", dtype="float32", result=path, **asked)
    found = json.loads(path.read_text())
    assert found["machine"] and found["versions"] and list(found["tasks"]) == ["four-of-16"]
    told = found["tasks"]["four-of-16"]["ways"]
    assert list(told) == ["best_of", "draft", "racing"]
    assert all(len(each["turns"]) == 3 for each in told.values())
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


def test_looks_are_compared_with_the_end(looks: Any, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    looks.main(prompts=3, candidates=16, model=str(tiny_folder), runtime="torch", dtype="float32", result=path)
    found = json.loads(path.read_text())
    assert found["prompts"] == 3 and {"estimate after 2 steps", "draft in 1 steps"} <= found["looks"].keys()
    assert all(-1 <= each["rank_correlation"] <= 1 for each in found["looks"].values())
    for each in found["looks"].values():  # the more are painted, the less is lost
        for lost in (list(each["best"].values()), list(each["best four"].values())):
            assert lost == sorted(lost, reverse=True) and lost[-1] >= 0


def test_what_is_lost_by_painting_few(looks: Any) -> None:
    seen, ends = looks.np.array([0.1, 0.4, 0.3, 0.2]), looks.np.array([1.0, 0.5, 0.9, 0.0])
    assert looks.lost(seen, ends, few=2, keep=1) == pytest.approx(0.1)  # the second and the third are painted
    assert looks.lost(seen, ends, few=2, keep=2) == pytest.approx(0.95 - 0.7)
    assert looks.lost(seen, ends, few=4, keep=2) == 0
