"""What people are shown of a result."""

import json
from pathlib import Path

from clip_core.clip import CLIP
from tests.training.evaluation.draughtsman import Draughtsman, measured
from training.evaluation.painting import MODES
from training.evaluation.tables import fault_table, in_words, table


def test_the_tables_show_every_measure(clip: CLIP, tmp_path: Path) -> None:
    result = measured(Draughtsman(), clip, tmp_path)
    lines = table(result).splitlines()
    assert len(lines) == 2 + 4 * len(MODES) + 1
    assert len({line.count("|") for line in lines}) == 1
    assert "best of 4" in lines[0] and "| 100.0 % (44–100) |" in lines[2]
    assert len({line.count("|") for line in fault_table(result).splitlines()}) == 1
    assert json.loads(json.dumps(result)) == result
    assert {"date", "commit", "machine", "versions", "seconds", "num_candidates"} <= set(result)


def test_a_card_says_the_same_in_words(clip: CLIP, tmp_path: Path) -> None:
    result = measured(Draughtsman(), clip, tmp_path, about={"model": "drawn", "on": "cpu"})
    lines = in_words(result)
    assert len(lines) == 1 + 4 * len(MODES) + 1
    words = "all candidates 100.0 % (100–100), best of 4 100.0 % (44–100), any of 4 100.0 % (44–100)"
    assert lines["one object right, --no-prior"] == words
    assert lines["measured"].endswith("weights as bundled, default settings")
