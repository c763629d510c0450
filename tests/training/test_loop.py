"""The loop: its schedule, average and accumulation exact; killed and resumed it ends with the same bits."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.training.line import NUM_POINTS, Line, at_forward, interrupt, recipe
from tests.training.tiny_recipes import recipes
from training.checkpoints import CheckpointError, latest
from training.clip_task import ClipRecipe, ClipTask
from training.loop import check_place, learning_rate, train
from training.recipe import TrainSection, check

ROOT = Path(__file__).resolve().parents[2]
STATE = ("network.safetensors", "average.safetensors", "optimizer.safetensors")


def checkpoint(out: Path) -> Path:
    found = latest(out / "checkpoints")
    assert found is not None
    return found


def state(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = checkpoint(out)
    return {f"{name}:{key}": value for name in STATE for key, value in load_file(folder / name).items()}


def same(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert checkpoint(one).name == checkpoint(other).name and first.keys() == second.keys() and len(first) > 10
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    models = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What was logged for TensorBoard: (step, value) by name."""
    log = EventAccumulator(str(out / "logs" / "line"))
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


# --- schedule, average, accumulation ----------------------------------------------------------------------


def test_the_learning_rate_is_exact() -> None:
    section: dict[str, Any] = {"batch_size": 1, "learning_rate": 0.8, "warmup_steps": 4}
    cosine = TrainSection(steps=12, **section)
    rates = [learning_rate(cosine, step) for step in range(13)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[8] == pytest.approx(0.4)  # half way down
    assert rates[6] == pytest.approx(0.8 * (2 + 2**0.5) / 4)  # cos(45 degrees)
    assert rates[12] == pytest.approx(0)
    constant = TrainSection(steps=12, schedule="constant", **section)
    assert [learning_rate(constant, step) for step in (0, 3, 4, 11)] == pytest.approx([0.2, 0.8, 0.8, 0.8])
    cold = TrainSection(steps=12, batch_size=1, learning_rate=0.8, warmup_steps=0)
    assert learning_rate(cold, 0) == 0.8


def test_what_is_written_and_logged(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    task = Line()
    outcome = train(task, asked, progress=False)
    assert (outcome.folder, outcome.step, outcome.scores) == (tmp_path / "model", 12, {"score": 1.0})
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["loss"]] == list(range(1, 13))
    rates = [value for _, value in logged["learning_rate"]]
    assert rates == pytest.approx([learning_rate(asked.train, step) for step in range(12)])
    assert {"grad_norm", "score"} <= logged.keys()
    assert logged["loss"][-1][1] < logged["loss"][0][1]
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [
        "00000004.png",
        "00000008.png",
        "final.png",
    ]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("events.out")]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".png"}
    for path in tmp_path.rglob("*"):  # pickle, by its first bytes or inside a zip as torch.save writes it
        assert path.is_dir() or path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
    assert task.looked and not any(task.looked)  # always in eval mode
    assert task.network.training


def test_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path, keep_checkpoints=2), progress=False)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000012"]


def test_the_average_is_exponential(tmp_path: Path) -> None:
    task = Line()
    train(task, recipe(tmp_path, ema_decay=0.5), progress=False)
    network = load_file(checkpoint(tmp_path) / "network.safetensors")
    average = load_file(checkpoint(tmp_path) / "average.safetensors")
    assert average.pop("n_averaged") == 12
    after = [*task.weights[1:], network]  # after each step
    for name, value in average.items():
        expected = after[0][name.removeprefix("module.")].double()
        for count, weights in enumerate(after[1:], 1):
            decay = min(0.5, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * weights[name.removeprefix("module.")].double()
        assert torch.allclose(value.double(), expected, atol=1e-6), name
    model = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, average[f"module.{name}"]) for name, value in model.items())
    assert not torch.equal(model["0.weight"], network["0.weight"])


def test_without_an_average_the_trained_weights_are_kept(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path, ema_decay=None), progress=False)
    network = load_file(checkpoint(tmp_path) / "network.safetensors")
    model = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, network[name]) for name, value in model.items())
    assert not (checkpoint(tmp_path) / "average.safetensors").exists()


def test_two_batches_of_8_are_one_of_16(tmp_path: Path) -> None:
    tasks = {count: Line() for count in (1, 2, 4)}
    for count, task in tasks.items():
        train(task, recipe(tmp_path / str(count), batch_size=16 // count, accumulate=count), progress=False)
    assert [one + other for one, other in zip(tasks[2].seen[::2], tasks[2].seen[1::2], strict=True)] == tasks[1].seen
    whole = state(tmp_path / "1")
    for count in (2, 4):
        for key, value in state(tmp_path / str(count)).items():
            assert torch.allclose(value, whole[key], rtol=1e-4, atol=1e-6), key


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """With momentum off, AdamW's first moment after one step is the clipped gradient itself."""
    norms = {}
    for most in (0.01, None):
        out = tmp_path / str(most)
        train(Line(), recipe(out, steps=1, betas=[0.0, 0.9], max_grad_norm=most), progress=False)
        moments = load_file(checkpoint(out) / "optimizer.safetensors")
        norms[most] = torch.cat([v.flatten() for k, v in moments.items() if k.endswith("exp_avg")]).norm().item()
    assert norms[0.01] == pytest.approx(0.01, rel=1e-4)
    assert norms[None] > 0.1  # type: ignore[index]


def test_decay_acts_on_matrices_alone(tmp_path: Path) -> None:
    task = Line()
    train(task, recipe(tmp_path, weight_decay=0.25), progress=False)
    groups = json.loads((checkpoint(tmp_path) / "state.json").read_text())["optimizer"]
    names = [name for name, value in task.network.named_parameters() if value.ndim >= 2]
    assert names == ["0.weight", "3.weight"]
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.25, 2), (0.0, 4)]


def test_every_example_is_seen_once_an_epoch(tmp_path: Path) -> None:
    task = Line()
    train(task, recipe(tmp_path, steps=16), progress=False)
    for epoch in (task.seen[:8], task.seen[8:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(NUM_POINTS))


def test_mixed_precision_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    task = Line()
    train(task, recipe(tmp_path, steps=40, mixed_precision="bf16"), progress=False)
    losses = [value for _, value in scalars(tmp_path)["loss"]]
    assert losses[-1] < 0.7 * losses[0]
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}


def test_processes_that_read_data_give_the_same(tmp_path: Path) -> None:
    for workers in (0, 1):
        train(Line(noise=0.1, dropout=0.2), recipe(tmp_path / str(workers), workers=workers), progress=False)
    same(tmp_path / "0", tmp_path / "1")


# --- resume -----------------------------------------------------------------------------------------------


def run_and_be_killed(code: str) -> None:
    """Run Python that must end by SIGKILL."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_in_the_middle_of_an_epoch_it_ends_with_the_same_bits(
    few_shapes: Path, tmp_path: Path, optimizer: str
) -> None:
    """A real part with dropout: CLIP on Shapes, killed in step 7 of 10 (batch 3 of the second epoch of 4)."""
    fields = recipes(few_shapes, tmp_path)["clip"]
    fields["train"] = fields["train"] | {"steps": 10, "save_every": 5, "sheet_every": 3, "optimizer": optimizer}
    fields["text"] = fields["text"] | {"attention_dropout": 0.2}
    paths = {name: tmp_path / name for name in ("straight", "killed")}
    asked = {name: check(ClipRecipe, fields | {"out": str(path)}) for name, path in paths.items()}
    train(ClipTask(asked["straight"]), asked["straight"], progress=False)
    run_and_be_killed(
        f"""
from tests.training.line import kill
from training.clip_task import ClipRecipe, ClipTask
from training.loop import train
class Killed(ClipTask):
    calls = 0
    def forward(self, batch, rng):
        self.calls += 1
        if self.calls == 7:
            kill()
        return super().forward(batch, rng)
recipe = ClipRecipe.model_validate_json({asked["killed"].model_dump_json()!r})
train(Killed(recipe), recipe, progress=False)
"""
    )
    assert checkpoint(paths["killed"]).name == "step-00000005"
    assert train(ClipTask(asked["killed"]), asked["killed"], progress=False).step == 10
    same(paths["straight"], paths["killed"])


@pytest.mark.parametrize("moment", ["model", "checkpoint"])
def test_killed_while_it_saves_it_ends_with_the_same_bits(tmp_path: Path, moment: str) -> None:
    """Killed in the third save, with half of a model or half of a checkpoint on disk."""
    run_and_be_killed(
        f"""
from pathlib import Path
from tests.training.line import Line, kill, recipe
import training.checkpoints
from training.loop import train
task = Line(dropout=0.2, noise=0.1)
if {moment == "model"}:
    save = task.save
    task.save = lambda network, folder: kill() if task.saves == 2 else save(network, folder)
else:
    write = training.checkpoints.save_file
    def save_file(tensors, path):
        write(tensors, path)
        if task.saves == 3 and path.name == "average.safetensors":
            kill()
    training.checkpoints.save_file = save_file
train(task, recipe(Path({str(tmp_path / "killed")!r})), progress=False)
"""
    )
    assert checkpoint(tmp_path / "killed").name == "step-00000010"
    for out in ("straight", "killed"):
        train(Line(dropout=0.2, noise=0.1), recipe(tmp_path / out), progress=False)
    same(tmp_path / "straight", tmp_path / "killed")
    for name in ("partial", "old"):
        assert not list(tmp_path.rglob(f"*.{name}"))


@pytest.mark.parametrize("step", [1, 7, 8, 12])
def test_ctrl_c_finishes_the_step_saves_and_is_resumed(tmp_path: Path, step: int) -> None:
    train(Line(dropout=0.2, noise=0.1), recipe(tmp_path / "straight"), progress=False)
    task = Line(dropout=0.2, noise=0.1, before=at_forward(step, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(task, recipe(tmp_path / "broken"), progress=False)
    assert checkpoint(tmp_path / "broken").name == f"step-{step:08d}"
    assert (tmp_path / "broken" / "model").is_dir()
    task = Line(dropout=0.2, noise=0.1)
    train(task, recipe(tmp_path / "broken"), progress=False)
    assert len(task.seen) == 12 - step
    same(tmp_path / "straight", tmp_path / "broken")


def test_ctrl_c_is_its_old_self_again_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # Python's own, or ignored where a shell started this as a job
    train(Line(), recipe(tmp_path), progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(Line(before=at_forward(7, twice)), recipe(tmp_path), progress=False)
    assert checkpoint(tmp_path).name == "step-00000005"


def test_a_run_that_is_done_does_not_train_more(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path), progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    task = Line()
    assert train(task, recipe(tmp_path), progress=False).step == 12
    assert task.seen == [] and task.saves == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_how_often_it_writes_may_change_on_resume(tmp_path: Path) -> None:
    train(Line(dropout=0.2), recipe(tmp_path / "straight"), progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(Line(dropout=0.2, before=at_forward(6, interrupt)), recipe(tmp_path / "other"), progress=False)
    (tmp_path / "other").rename(tmp_path / "moved")
    asked = recipe(tmp_path / "moved", save_every=1, sheet_every=1, log_every=5)
    train(Line(dropout=0.2), asked, progress=False)
    same(tmp_path / "straight", tmp_path / "moved")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path, steps=2), progress=False)
    before = sorted(tmp_path.rglob("*"))
    what = r"train\.schedule was .* and is \"constant\", train\.steps was 2 and is 3"
    for check_it in (check_place, lambda asked: train(Line(), asked, progress=False)):
        message = rf"step-00000002 was made by another recipe \({what}\); choose another `out`"
        with pytest.raises(CheckpointError, match=message):
            check_it(recipe(tmp_path, steps=3, schedule="constant"))
    assert sorted(tmp_path.rglob("*")) == before
    path = checkpoint(tmp_path) / "state.json"
    content = json.loads(path.read_text())
    del content["recipe_keys"]  # as checkpoints were before
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"step-00000002 was made by another recipe; choose another `out`"):
        check_place(recipe(tmp_path, steps=3))


def test_other_data_under_the_same_path_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path, steps=2), progress=False)
    before = sorted(tmp_path.rglob("*"))
    other = Line()
    other.reads = "another line"
    with pytest.raises(CheckpointError, match=r"step-00000002 was trained on other pictures"):
        train(other, recipe(tmp_path, steps=2), progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_hears_how_much_is_done(tmp_path: Path) -> None:
    heard: list[float] = []
    train(Line(before=lambda task: heard.append(task.progress)), recipe(tmp_path, steps=4), progress=False)
    assert heard == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("name", [*STATE, "random.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_a_damaged_checkpoint_is_told_by_its_name(tmp_path: Path, name: str, damage: str) -> None:
    train(Line(), recipe(tmp_path, steps=2), progress=False)
    path = checkpoint(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[: len(content) // 2])
    if damage == "other":
        path.write_bytes(b"[1, 2]")
    with pytest.raises(CheckpointError, match=r"step-00000002.* remove ") as caught:
        train(Line(), recipe(tmp_path, steps=2), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_network_is_trained_alike_and_goes_on_uncompiled(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path / "plain"), progress=False)
    train(Line(), recipe(tmp_path / "compiled", compile=True), progress=False)
    plain, compiled = state(tmp_path / "plain"), state(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        assert torch.allclose(compiled[key], value, atol=1e-4), key
    assert train(Line(), recipe(tmp_path / "compiled"), progress=False).step == 12


def test_starting_from_trained_weights(tmp_path: Path) -> None:
    train(Line(), recipe(tmp_path / "first"), progress=False)
    model = tmp_path / "first" / "model"
    asked = recipe(tmp_path / "second").model_copy(update={"init": str(model)})
    task = Line()
    train(task, asked, progress=False)
    for name, value in load_file(model / "model.safetensors").items():
        assert torch.equal(task.weights[0][name], value)
    (model / "model.safetensors").unlink()
    assert train(Line(), asked, progress=False).step == 12  # resumed, so nothing is asked of `init`
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors to start from"):
        train(Line(), recipe(tmp_path / "third").model_copy(update={"init": str(model)}), progress=False)


# --- what goes wrong --------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_saves_nothing(tmp_path: Path) -> None:
    """It turns wrong in step 7, between two logs; the checkpoint of step 5 must stay the newest."""

    def spoil(task: Line) -> None:
        if len(task.seen) == 6:
            with torch.no_grad():
                task.network.offset.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 10; lower train\.learning_rate"):
        train(Line(before=spoil), recipe(tmp_path, log_every=1000), progress=False)
    assert checkpoint(tmp_path).name == "step-00000005"
    assert all(value.isfinite().all() for value in state(tmp_path).values())


def test_a_gradient_that_is_no_number_is_not_saved_either(tmp_path: Path) -> None:
    """The loss of the step that spoils the weights is itself still finite."""

    def spoil(task: Line) -> None:
        if len(task.seen) == 9:
            task.network[0].weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(FloatingPointError, match=r"grad_norm is (nan|inf) at step 10"):
        train(Line(before=spoil), recipe(tmp_path, log_every=1000), progress=False)
    assert checkpoint(tmp_path).name == "step-00000005"


def test_too_little_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 65 is larger than the 64 usable examples"):
        train(Line(), recipe(tmp_path, batch_size=65), progress=False)


def test_a_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loop.is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=r"TensorBoard, which is not installed; pip install 'unclip\[train\]'"):
        train(Line(), recipe(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fp16' and the device is a CPU; choose bf16 or no"):
        train(Line(), recipe(tmp_path, mixed_precision="fp16"), progress=False)


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out '.*inside' cannot be written: .*file is no folder"):
        check_place(recipe(tmp_path / "file" / "inside"))


# --- what a person sees -----------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take anything for a terminal
    train(Line(), recipe(tmp_path))
    shown = capsys.readouterr()
    assert "line" in shown.err and "12/12" in shown.err and "loss" in shown.err and shown.out == ""


def test_a_file_gets_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "training.terminal"):
        train(Line(), recipe(tmp_path / "told", log_every=6))
        train(Line(), recipe(tmp_path / "quiet"), progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "training.terminal"]
    assert len(lines) == 2 and lines[0].startswith("line 6/12 ") and " loss " in lines[0]
    assert capsys.readouterr() == ("", "")


# --- many processes ---------------------------------------------------------------------------------------


def two_processes(code: str, folder: Path, meanwhile: Callable[[], Any] = lambda: None) -> str:
    """Train the `task` by the `recipe` that `code` makes in two processes; what they say."""
    (folder / "script.py").write_text(
        code
        + """
import sys
from training.loop import train
try:
    outcome = train(task, recipe, progress=False)
    sys.stdout.write(f"scores {len(outcome.scores)}\\n")
except KeyboardInterrupt:
    sys.stdout.write("interrupted\\n")
"""
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "script.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        meanwhile()
        printed, _ = running.communicate(timeout=120)
    finally:
        running.terminate()  # and torch.distributed.run ends its processes
    assert running.returncode == 0, printed
    return printed


def test_an_interrupt_of_one_process_stops_both_and_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"""
import os
from pathlib import Path
from tests.training.line import Line, at_forward, interrupt, recipe
before = {{}} if os.environ["RANK"] == "0" else {{"before": at_forward(5, interrupt)}}
task = Line(noise=0.1, **before)
recipe = recipe(Path({str(tmp_path / "out")!r}), log_every=3, batch_size=4)
"""
    assert two_processes(code, tmp_path).count("interrupted") == 2
    assert checkpoint(tmp_path / "out").name == "step-00000006"  # where they next meet
    task = Line(noise=0.1)
    with caplog.at_level(logging.WARNING):
        train(task, recipe(tmp_path / "out", log_every=3, batch_size=4), progress=False)
    assert len(task.seen) == 6
    assert "was trained by 2 processes and goes on with 1" in caplog.text


def test_two_processes_train_as_one_and_only_one_writes(few_shapes: Path, tmp_path: Path) -> None:
    """CLIP's loss spans all processes' batches, so two of 8 are one of 16."""
    fields = recipes(few_shapes, tmp_path)["clip"]
    train_keys = fields["train"] | {"steps": 2, "save_every": 1, "sheet_every": 1}
    sizes = {"one": 16, "two": 8}
    asked = {
        name: check(ClipRecipe, fields | {"out": str(tmp_path / name), "train": train_keys | {"batch_size": size}})
        for name, size in sizes.items()
    }
    code = f"""
from training.clip_task import ClipRecipe, ClipTask
recipe = ClipRecipe.model_validate_json({asked["two"].model_dump_json()!r})
task = ClipTask(recipe)
"""
    printed = two_processes(code, tmp_path, lambda: train(ClipTask(asked["one"]), asked["one"], progress=False))
    assert sorted(re.findall(r"scores \d", printed)) == ["scores 0", "scores 1"]  # the main process alone measures
    two, one = state(tmp_path / "two"), state(tmp_path / "one")
    for key, value in one.items():
        if key.endswith("exp_avg"):  # gradients, clipped and averaged
            assert torch.allclose(two[key], value, rtol=1e-3, atol=1e-6), key
        if key.startswith("network") and not key.endswith("k_proj.bias"):  # whose gradient is zero but for rounding
            # Adam's first steps have the size of the rate wherever a gradient is, so a few that are nearly zero turn
            assert ((two[key] - value).abs() > 2e-5).float().mean() < 0.01, key
    assert len(list((tmp_path / "two" / "logs").rglob("events*"))) == 1
    assert not list((tmp_path / "two").rglob("*.partial"))
