"""What memory is free, by the machine's own word and by a container's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gen import memory

GIB = 2**30


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
def test_what_is_free_is_known_on_linux() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is not None and 10**6 < free < 10**14
    assert memory.free_memory(torch.device("meta")) is None


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has read of files and may forget is no memory taken."""
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path / "group")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {64 * 2**20} kB\n")
    cpu = torch.device("cpu")
    assert memory.free_memory(cpu) == 64 * GIB
    (tmp_path / "group").mkdir()
    for name, text in (
        ("memory.max", f"{8 * GIB}\n"),
        ("memory.current", f"{7 * GIB}\n"),
        ("memory.stat", f"anon {3 * GIB}\nfile {4 * GIB}\ninactive_file {3 * GIB}\n"),
    ):
        (tmp_path / "group" / name).write_text(text)
    assert memory.free_memory(cpu) == 4 * GIB
    (tmp_path / "group" / "memory.current").write_text(f"{12 * GIB}")
    assert memory.free_memory(cpu) == 0
    (tmp_path / "group" / "memory.max").write_text("max\n")
    assert memory.free_memory(cpu) == 64 * GIB


def test_what_cuda_graphs_keep_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "_APART", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * GIB)
    assert memory.free_memory(gpu) == 50 * GIB
    memory.set_apart(gpu, 15 * GIB)
    memory.set_apart(gpu, 5 * GIB)
    assert memory.free_memory(gpu) == 30 * GIB
    assert memory.free_memory(torch.device("cuda", 1)) == 50 * GIB


def test_what_a_machine_may_find_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 5 kB\nSwapFree:        3 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.reserve() == 3 * 1024
    (tmp_path / "memory.stat").write_text("inactive_file 9\nactive_file 7\n")
    assert memory.reserve() == 3 * 1024 + 7
    (tmp_path / "meminfo").unlink()
    assert memory.reserve() == 7


def test_the_most_that_was_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert memory.peak_memory("cpu") > 10**5, "as getrusage has it, on Linux in kilobytes"
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t  5 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.peak_memory(torch.device("cpu")) == 5 * 1024
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert memory.peak_memory("cuda:1") == 7
