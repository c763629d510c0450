"""benchmarks/best_of.py: its contestants paint the same, it notices when they do not, and it keeps what it found."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn

import best_of
from contest import turns, ways, workers
from contest.comparison import CLOSE, apart, entered, faults
from contest.contestants import Ours, Peer, sizes_of
from contest.tables import table
from contest.tasks import WORKLOADS, Task, task_of
from contest.ways import OURS, Entrant

TINY = ("shapes64-tiny", "tiny")


@pytest.fixture(scope="module", params=TINY)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    found, _ = task_of(WORKLOADS[request.param], tmp_path_factory.mktemp("model"), "cpu")
    return found


def row(way: str, dtype: str = "float32", **other: Any) -> dict[str, Any]:
    """One that has nothing wrong."""
    found = {"way": way, "dtype": dtype, "seconds": [2.0, 1.0, 3.0], "peak_memory_mb": [None], "ready_seconds": 1.0}
    found |= {"error": 1e-6, "max_error": 1e-6, "same_kept": {"transformers": True, "unclip": True}}
    return found | other


# --- contestants -------------------------------------------------------------------------------------------------


def test_contestants_paint_and_keep_the_same(task: Task) -> None:
    stock = Peer.load(task, torch.float32, is_tuned=False)
    others = [
        Peer.load(task, torch.float32, is_tuned=True),
        Ours.load(task, torch.float32, is_tuned=False),
        Ours.load(task, torch.float32, is_tuned=True),
    ]
    others[0].batch_size = 1
    latents, pictures, kept = stock.latents(), stock.pictures(), stock.paint()
    assert len(set(kept)) == task.keep and kept == stock.rank(pictures)
    for other in others:
        assert apart(other.latents().numpy(), latents.numpy())["max_error"] < CLOSE
        assert np.abs(other.pictures().astype(int) - pictures).max() <= 1
        assert other.paint() == other.rank(pictures) == kept
    guided = Ours(others[1].model, replace(task, guidance_scale=task.guidance_scale + 1))
    assert apart(guided.latents().numpy(), latents.numpy())["max_error"] > 10 * CLOSE


def test_a_peer_takes_the_batch_size_that_was_fastest(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer.load(task, torch.float32, is_tuned=True)
    monkeypatch.setattr(Peer, "_seconds", lambda self: {1: 0.1}.get(self.batch_size, 0.5))
    took = peer.search()
    assert list(took) == sizes_of(task.number) and peer.batch_size == 1


def test_batches_are_of_equal_size() -> None:
    assert {number: sizes_of(number) for number in (1, 3, 6, 16)} == {
        1: [1],
        3: [1, 3],
        6: [1, 2, 6],
        16: [1, 2, 4, 8, 16],
    }


def test_a_networks_time_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Identity()
    outer = nn.Sequential(inner, inner)
    ticks = iter(range(100))
    monkeypatch.setattr(turns, "moment", lambda device: float(next(ticks)))
    with turns.clocked({"outer": [outer], "inner": [inner]}, "cpu") as spent:
        outer(torch.zeros(1))
        inner(torch.zeros(1))
    outer(torch.zeros(1))  # no longer watched
    assert spent == {"outer": 3.0, "inner": 1.0}  # the two inner calls within the outer one begin a reading each


# --- what must hold ----------------------------------------------------------------------------------------------


def test_what_is_wrong_with_ours_is_told() -> None:
    stock, half = row("diffusers"), row("diffusers", "bfloat16", error=0.02)
    fine = [stock, half, row("unclip"), row("unclip", "bfloat16", error=0.029), row("tuned", max_error=1.0)]
    assert faults([*fine, {"way": "openvino", "dtype": "float32", "not_measured": "why"}]) == []
    for wrong, message in (
        (row("unclip", max_error=2e-4), "latents differ by 2.0e-04"),
        (row("unclip", max_error=float("nan")), "latents differ by nan"),
        (row("unclip-compile", same_kept={"transformers": True, "unclip": False}), "as unclip ranks"),
        (row("unclip", same_kept={"transformers": False, "unclip": True}), "as transformers ranks"),
        (row("unclip", "bfloat16", error=0.031), "more than 1.5 times"),
    ):
        (fault,) = faults([stock, half, wrong])
        assert fault.startswith(f"{wrong['way']} {wrong['dtype']}: ") and message in fault


def test_a_fault_ends_the_command_after_the_result_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("diffusers"), row("unclip", max_error=1.0)]
    outcome = {"rows": rows, "faults": faults(rows), "profile": {}}
    monkeypatch.setattr(best_of, "contest", lambda *_: outcome)
    with pytest.raises(SystemExit, match="shapes64-tiny: unclip float32: latents differ"):
        best_of.main(workload=["shapes64-tiny"], device="cpu", result=tmp_path / "best_of.json")
    kept = json.loads((tmp_path / "best_of.json").read_text())
    assert kept["workloads"]["shapes64-tiny"]["faults"] == outcome["faults"]


def test_what_cannot_be_measured_says_why(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ways.shutil, "which", lambda name: None)
    ready: dict[Any, Any] = {}
    with ExitStack() as stack:
        found = [
            entered(Entrant(way, "float32"), task, stack, ready) for way in ("openvino", "unclip-openvino", "compiled")
        ]
    assert not ready
    printed = table([row("diffusers"), *found])
    assert "not measured: openvino is not installed" in printed and "not measured: there is no C++ compiler" in printed


def test_a_contestants_error_reaches_the_benchmark(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "quiet", lambda: None)  # this process is not the contestant's own
    here, there = multiprocessing.Pipe()
    workers.serve(there, OURS, replace(task, model="no-such-model"))
    assert "model 'no-such-model' is unknown" in here.recv().trace


@pytest.mark.parametrize("asked", [{"sizes": "huge"}, {"workload": ["x"]}, {"way": ["x"]}, {"dtype": ["float8"]}])
def test_unknown_names_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(typer.BadParameter, match="is unknown; choose from"):
        best_of.main(**asked, device="cpu")


# --- the table and the whole -------------------------------------------------------------------------------------


def test_ratios_are_of_medians_in_one_precision() -> None:
    rows = [row("diffusers", seconds=[4.0, 9.0, 5.0]), row("tuned", seconds=[3.0])]
    rows += [row("unclip"), row("diffusers", "bfloat16", seconds=[1.0]), row("unclip", "bfloat16")]
    cells = [line.split(" | ") for line in table(rows).splitlines()[2:]]
    assert [line[2:5] for line in cells] == [
        ["5 (4–9)", "1.00× (diffusers)", ""],
        ["3 (3–3)", "1.67× (diffusers)", ""],
        ["2 (1–3)", "2.50× (diffusers)", "1.50× (tuned)"],
        ["1 (1–1)", "1.00× (diffusers)", ""],
        ["2 (1–3)", "0.50× (diffusers)", "0.50× (diffusers)"],
    ]


def test_the_command_measures_in_processes_and_keeps_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_of, "quiet", lambda: None)
    asked = {"workload": ["tiny"], "way": ["diffusers"], "dtype": ["float32"], "repeats": 2, "number": 2, "steps": 2}
    best_of.main(**asked, device="cpu", profile=True, result=tmp_path / "best_of.json")
    found = json.loads((tmp_path / "best_of.json").read_text())
    assert found["machine"] and found["versions"]["diffusers"] and "openvino" in found["versions"]
    tiny = found["workloads"]["tiny"]
    assert (tiny["number"], tiny["keep"], tiny["steps"], tiny["faults"]) == (2, 2, 2, [])
    assert [(each["way"], len(each["seconds"])) for each in tiny["rows"]] == [("diffusers", 2), ("unclip", 2)]
    for each in tiny["rows"]:
        assert min(each["seconds"]) > 0 and sorted(each["kept"]) == [0, 1] and each["max_error"] < CLOSE
        assert each["of_roof"] == pytest.approx(tiny["operations"] / median(each["seconds"]) / tiny["roofs"]["float32"])
    assert list(tiny["profile"]) == ["diffusers float32", "unclip float32"]
    for shares in tiny["profile"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert all(0 < shares[name] < 1 for name in ("UNet", "VAE", "CLIP", "text", "host"))
    printed = capsys.readouterr().out
    assert (
        "best 2 of 2, 2 steps" in printed and "| **unclip** | float32 |" in printed and "| unclip float32 |" in printed
    )
