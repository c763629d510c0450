"""A ledger keeps whole lines, of one evaluation."""

from pathlib import Path

import pytest

from training.evaluation.ledger import Judged, Ledger, Outcome


def test_a_line_cut_short_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    outcomes = [Outcome(f"one-{i:03d}", "one", "prior", 1.0, (Judged(i, 0.5, ("shape",)),)) for i in range(3)]
    Ledger(path, {"model": "m"}).append(outcomes)
    whole = path.read_text()
    path.write_text(whole[:-20])
    ledger = Ledger(path, {"model": "m"})
    assert ledger.outcomes == outcomes[:2]
    ledger.append(outcomes[2:])
    assert path.read_text() == whole and Ledger(path, {"model": "m"}).outcomes == outcomes
    path.write_text(whole.replace('"group"', "group"))
    with pytest.raises(ValueError, match="is damaged"):
        Ledger(path, {"model": "m"})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "candidates.jsonl", Path("/proc/unclip/candidates.jsonl")):
        with pytest.raises(ValueError, match=r"candidates.jsonl cannot be written \(.*\); give another folder"):
            Ledger(path, {})
