"""The verb `evaluate` on a tiny random model of the real classes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.tiny import make_tiny_stable_unclip
from training.evaluate_cli import evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_unclip(tmp_path_factory.mktemp("model"))


def run(*words: object) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_json_is_all_that_standard_output_holds(model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "-n", 2, "--limit", 1, "--out", tmp_path, "--no-prior")
    result = run(*words, "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert set(printed["painted"]) == {"no_prior"} and set(printed["painted"]["no_prior"]) == {
        "one",
        "relation",
        "count",
        "held_out",
    }
    assert (printed["num_candidates"], printed["retrieval"]["captions"]) == (2, 100)
    assert len(printed["model_hash"]) == 64 and printed["settings"]["num_inference_steps"] == 4
    kept = (tmp_path / "candidates.jsonl").read_bytes()
    again = run(*words)
    assert (tmp_path / "candidates.jsonl").read_bytes() == kept  # nothing was painted twice
    assert again.stdout.startswith("| measure | mode |") and "CLIP text→image retrieval" in again.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-n", 0), "number=0 is out of range; give a whole number of 1 or more"),
        (("--limit", 0), "limit=0 is out of range; give a whole number of 1 or more"),
        (("--batch-size", 0), "batch_size=0 is out of range; give a whole number of 1 or more"),
        (("--model", "no such model"), "model 'no such model' is unknown"),
        (("--seed", -1), "seed is -1; give one from 0 to"),
    ],
)
def test_mistakes_are_told_in_one_line(model: Path, tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        run("--model", model, "--out", tmp_path / "out", *words)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_verb_itself_imports_nothing_heavy() -> None:
    words = "import sys, training.evaluate_cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
