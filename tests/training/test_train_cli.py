"""`unclip train` and `unclip data` as people type them."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gen import command
from tests.training.tiny_recipes import recipes, written
from tests.typed import ROOT, refused
from training.cli import PARTS
from training.parts import PART_TASKS


@pytest.mark.parametrize("words", [("train",), ("data",), ("data", "shapes")])
def test_help_is_quick_and_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        f"import sys; from gen.command import main; status = main({[*words, '--help']!r}); "
        "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr); sys.exit(status)"
    )
    seconds = []
    for _ in range(3):  # the quickest of three: other work on the machine only ever adds
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0 and "Usage" in done.stdout
    heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "samplers", "clip_core"}
    assert not heavy & set(done.stderr.split())
    assert min(seconds) < 1.0


def test_the_parts_that_help_names_are_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(PARTS) == {*PART_TASKS, "bundle"}
    assert command.main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for part in PARTS:
        assert part in printed
    for recipe in (ROOT / "training" / "recipes").glob("*.yaml"):
        assert re.search(rf"\b{recipe.stem}\b", printed)
    (line,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith('"train: ')]
    assert all(part in line for part in PARTS)


def test_mistakes_are_one_line(few_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = recipes(few_shapes, tmp_path / "out")
    path = written(fields["vae"], tmp_path)
    assert "part 'unet' is unknown; choose from: clip, vae" in refused(capsys, "train", "unet", "--recipe", path)
    assert "no recipe is given; say --recipe training/recipes/shapes64_vae.yaml" in refused(capsys, "train", "vae")
    assert "cannot be read: No such file" in refused(capsys, "train", "vae", "--recipe", tmp_path / "none.yaml")
    assert "is a recipe for 'vae', not for 'clip'" in refused(capsys, "train", "clip", "--recipe", path)
    assert "recipe key 'train.step' is unknown; choose from:" in refused(
        capsys, "train", "vae", "--recipe", path, "train.step=1"
    )
    assert "override 'steps' has no '='" in refused(capsys, "train", "vae", "--recipe", path, "steps")
    assert "holds no data" in refused(capsys, "train", "vae", "--recipe", path, f"data={tmp_path}")
    assert "batch_size 99 is larger than the 39 usable" in refused(
        capsys, "train", "vae", "--recipe", path, "train.batch_size=99"
    )
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(
        capsys, "train", "vae", "--recipe", path, f"out={tmp_path / 'file' / 'inside'}"
    )
    assert "holds no trained part" in refused(capsys, "train", "prior", "--recipe", written(fields["prior"], tmp_path))
    assert "holds no trained part" in refused(
        capsys, "train", "bundle", "--recipe", written(fields["bundle"], tmp_path)
    )
    words = ("--recipe", path, "network.block_out_channels=8")
    assert "network.block_out_channels is 8; give a list" in refused(capsys, "train", "vae", *words)
    assert not (tmp_path / "out").exists()


def test_mistakes_of_data_shapes_are_signed_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((tmp_path / "out", "--num", "0"), (tmp_path / "out", "--number", "3"), ()):
        assert "(see unclip data shapes --help)" in refused(capsys, "data shapes", *words)
    assert "exists already" in refused(capsys, "data shapes", tmp_path, "--num", "1")
    assert "(see unclip data --help)" in refused(capsys, "data", "squares")
    assert command.main(["data", "shapes", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--num" in printed and "Usage: unclip data shapes " in printed


def test_a_checkpoint_of_another_recipe_is_refused_before_the_data_is_read(
    trained: Path, few_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(recipes(few_shapes, trained)["vae"], tmp_path)
    message = refused(capsys, "train", "vae", "--recipe", path, "train.steps=3", "data=nowhere")
    assert "step-00000002 was made by another recipe" in message


def test_reading_and_writing_models_draw_no_bars(
    few_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = recipes(few_shapes, tmp_path / "out")
    for part in fields:
        path = written(fields[part], tmp_path)
        assert command.main(["train", part, "--recipe", str(path)]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("wrote ") and "shards" not in printed.err and "weights" not in printed.err, part


def test_what_training_leaves_out_is_told_at_the_end(
    few_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (few_shapes / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["file_name"] = str(few_shapes / row["file_name"])
    rows[1]["text"] = ""
    rows[2]["file_name"] = "gone.png"
    data = tmp_path / "data"
    data.mkdir()
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = written(recipes(data, tmp_path / "out")["vae"], tmp_path)
    assert command.main(["train", "vae", "--recipe", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"wrote {tmp_path / 'out' / 'vae' / 'model'} after 2 steps") and "psnr" in printed.out
    assert "1 skipped: empty caption (first: " in printed.err.splitlines()[-1]
    assert "1 skipped: missing file (first: gone.png)" in printed.err.splitlines()[-1]


def test_the_same_command_again_goes_on_and_does_no_more(
    trained: Path, few_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(recipes(few_shapes, trained)["clip"], tmp_path)
    model = trained / "clip" / "model" / "model.safetensors"
    before = (model.read_bytes(), model.stat().st_mtime_ns)
    assert command.main(["train", "clip", "--recipe", str(path)]) == 0
    assert "after 2 steps" in capsys.readouterr().out
    assert (model.read_bytes(), model.stat().st_mtime_ns) == before
