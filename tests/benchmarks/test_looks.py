"""benchmarks/looks.py: what an early look says of the end, and what is lost by painting few."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import looks


def test_looks_are_compared_with_the_end(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    looks.main(prompts=3, candidates=16, model=str(tiny_folder), runtime="torch", dtype="float32", result=path)
    found = json.loads(path.read_text())
    assert found["prompts"] == 3 and {"estimate after 2 steps", "draft in 1 steps"} <= found["looks"].keys()
    assert all(-1 <= each["rank_correlation"] <= 1 for each in found["looks"].values())
    for each in found["looks"].values():  # the more are painted, the less is lost
        for lost in (list(each["best"].values()), list(each["best four"].values())):
            assert lost == sorted(lost, reverse=True) and lost[-1] >= 0


def test_what_is_lost_by_painting_few() -> None:
    seen, ends = np.array([0.1, 0.4, 0.3, 0.2]), np.array([1.0, 0.5, 0.9, 0.0])
    assert looks.lost(seen, ends, few=2, keep=1) == pytest.approx(0.1)  # the second and the third are painted
    assert looks.lost(seen, ends, few=2, keep=2) == pytest.approx(0.95 - 0.7)
    assert looks.lost(seen, ends, few=4, keep=2) == 0
