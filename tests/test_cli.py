"""The command as people type it: its answers, its exit status, and that nothing half-done is left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

from gen import cli, command
from gen.output_folder import output_folder
from gen.picture import read_png
from tests.tiny import make_tiny_clip, make_tiny_stable_unclip

ROOT = Path(__file__).resolve().parent.parent
UNCLIP = [sys.executable, "-m", "gen.command"]  # what the installed script runs
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_unclip(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def painted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `unclip generate` leaves it: six candidates, the best two kept."""
    out = tmp_path_factory.mktemp("painted") / "out"
    arguments = ["generate", PROMPT, "-n", "6", "--keep", "2", "--seed", "10", "--model", str(tiny)]
    assert command.main([*arguments, "--out", str(out), "--quiet"]) == 0
    return out


def copy_of(model: Path, where: Path) -> Path:
    return Path(shutil.copytree(model, where / "copy"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> Any:
    """Run a verb with --json and return the one object on standard output."""
    capsys.readouterr()
    got = command.main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert got == status, printed.err
    assert printed.out.count("\n") == 1, "one object on one line"
    return json.loads(printed.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a verb that must refuse, and return the one line it says."""
    capsys.readouterr()
    status = command.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert status == 2, printed.err
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"unclip {arguments[0]}: "), printed.err
    return printed.err


# --- the dispatcher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [None, "generate", "score", "info", "reproduce"])
def test_help_is_quick_and_loads_no_heavy_library(verb: str | None) -> None:
    arguments = ["--help"] if verb is None else [verb, "--help"]
    code = (
        f"import sys; from gen.command import main; status = main({arguments!r}); "
        "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr); sys.exit(status)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0 and done.stdout
    heavy = {"torch", "diffusers", "transformers", "open_clip", "samplers", "clip_core", "training"}
    heavy |= {"typer", "rich", "PIL"} if verb is None else set()
    assert not heavy & set(done.stderr.split())
    # Processor seconds: on a quiet machine the same as those on the clock, and other work does not count.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_what_few_need_has_a_panel_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["generate", "--help"]) == 0
    common, panel = (re.findall(r"--[a-z-]+", part) for part in capsys.readouterr().out.split(" Advanced "))
    for option in ("--steps", "--guidance", "--seed", "--sampler", "--prior"):
        assert option in common and option not in panel
    for name in ("attention", "s_churn", "guidance_rule", "weak_unet", "apg_eta", "clip_guidance_scale"):
        option = f"--{name.replace('_', '-')}"
        assert option in panel and option not in common


def written_help(words: list[str], shown: Any) -> Iterator[tuple[list[str], str]]:
    """What to type, and every paragraph of help that the command, its options and its commands have in the source."""
    for each in (shown, *shown.params):
        yield from ((words, paragraph) for paragraph in (getattr(each, "help", None) or "").split("\n\n"))
    for name, below in getattr(shown, "commands", {}).items():
        yield from written_help([*words, name], below)


@pytest.mark.parametrize("verb", list(command.verbs()))
def test_help_has_every_word_of_its_source(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # so that nothing is wrapped
    target = command.verbs()[verb].entry.load()
    if not isinstance(target, typer.Typer):
        target, function = typer.Typer(add_completion=False), target
        target.command()(function)
    told: dict[str, str] = {}
    for words, paragraph in written_help([verb], typer.main.get_command(target)):
        if (typed := " ".join(words)) not in told:
            assert command.main([*words, "--help"]) == 0
            told[typed] = " ".join(capsys.readouterr().out.split())
        assert " ".join(paragraph.split()) in told[typed]


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("generate", "score", "info", "reproduce", "train", "data", "evaluate"):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [verb]]
        assert len(line.split()) > 4


def test_a_wrong_verb_is_told_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["paint", "a circle"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'paint' is unknown" in printed.err and "generate" in printed.err and printed.err.count("\n") == 1
    assert command.main([]) == 2
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == "unclip 0.1.0\n"


def verb_that_fails(how: str) -> None:
    """A verb for the next test: fails in the ways that a verb can."""
    if how == "ours":
        raise ValueError("given 3,\n allowed 1 to 2")
    if how == "torch":
        torch.zeros(2).view(3, 5)
    if how == "json":
        json.loads("{")  # a ValueError, but a library's
    if how == "disk":
        raise OSError(28, "No space left on device")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("how", "status"), [("ours", 2), ("torch", 1), ("json", 1), ("disk", 1), ("interrupt", 130)])
def test_exit_status_tells_who_erred(how: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    entry = EntryPoint("fail: fails", f"{__name__}:verb_that_fails", command.GROUP)
    got = command._run(command.Verb("fail", "fails", entry), [how])
    assert got == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("unclip fail: ")
    if how == "ours":
        assert last == "unclip fail: given 3, allowed 1 to 2"


# --- generate ---------------------------------------------------------------------------------------------


def test_generate_writes_the_best_and_a_sheet_of_all(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    told = answer(capsys, "generate", PROMPT, "-n", 6, "--seed", 10, "--model", tiny, "--out", out)
    paths = [Path(one["path"]) for one in told["pictures"]]
    assert sorted(path.name for path in out.iterdir()) == sorted([*(path.name for path in paths), "sheet.png"])
    assert len(paths) == 4, "the best four are kept unless told otherwise"
    scores = [one["score"] for one in told["candidates"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 6
    assert {one["seed"] for one in told["candidates"]} == set(range(10, 16))
    assert [one["kept"] for one in told["candidates"]] == [True] * 4 + [False] * 2
    for rank, (path, one) in enumerate(zip(paths, told["candidates"], strict=False), 1):
        picture, record = read_png(path)
        assert path.name == f"{rank:04d}-seed{one['seed']}.png"
        assert picture.size == (64, 64)
        assert (record["prompt"], record["seed"], record["score"]) == (PROMPT, one["seed"], one["score"])
        assert record["settings"] == told["settings"] and record["settings"]["num_inference_steps"] == 4
        assert record["model_hash"] == told["model"]["hash"] and len(record["model_hash"]) == 64
    with Image.open(told["sheet"]) as sheet:
        assert sheet.width > 4 * 64 and sheet.height > 2 * 64
    assert told["seconds"]["total"] > 0 and told["interrupted"] is False
    assert told["peak_memory_bytes"]["host"] > 10**8, "torch alone is more"


def test_a_seed_paints_the_same_pictures_and_settings_reach_the_painter(
    tiny: Path, painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", PROMPT, "-n", 6, "--keep", 2, "--seed", 10, "--model", tiny]
    told = answer(capsys, *common, "--out", tmp_path / "same")
    for one in told["pictures"]:
        path = Path(one["path"])
        assert path.read_bytes() == (painted / path.name).read_bytes()
    options = "--steps 3 --guidance 2.5 --sampler euler --eta 0.5 --no-prior --negative blue"
    options += " --width 32 --height 128"
    told = answer(capsys, *common, "--out", tmp_path / "other", *options.split())
    wanted = {"num_inference_steps": 3, "guidance_scale": 2.5, "sampler": "euler", "prior": False, "eta": 0.5}
    wanted |= {"negative_prompt": "blue", "width": 32, "height": 128}
    assert {name: told["settings"][name] for name in wanted} == wanted
    with Image.open(told["pictures"][0]["path"]) as picture:
        assert picture.size == (32, 128)
    options = "--sampler heun --s-churn 2 --s-tmin 0.1 --s-tmax 9 --s-noise 1.01"
    told = answer(capsys, *common, "--out", tmp_path / "churned", *options.split())
    wanted = {"sampler": "heun", "s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}
    assert {name: told["settings"][name] for name in wanted} == wanted
    assert answer(capsys, "reproduce", told["pictures"][0]["path"])["reproduced"] is True
    told = answer(capsys, *common, "--out", tmp_path / "climbed", "--clip-guidance-scale", 0.5)
    assert told["settings"]["clip_guidance_scale"] == 0.5
    options = "--guidance-rule apg --apg-eta 0.5 --apg-norm-threshold 3 --apg-momentum 0.1 --guidance-rescale 0.2"
    options += " --guidance-interval 0.1 9 --thresholding 4 --dynamic-thresholding-ratio 0.9"
    told = answer(capsys, *common, "--out", tmp_path / "guided", *options.split())
    wanted = {"guidance_rule": "apg", "apg_eta": 0.5, "apg_norm_threshold": 3.0, "apg_momentum": 0.1}
    wanted |= {"guidance_rescale": 0.2, "guidance_interval": [0.1, 9.0]}
    wanted |= {"thresholding": 4.0, "dynamic_thresholding_ratio": 0.9}
    assert {name: told["settings"][name] for name in wanted} == wanted
    assert answer(capsys, "reproduce", told["pictures"][0]["path"])["reproduced"] is True
    options = ["--guidance-rule", "autoguidance", "--weak-unet", tiny / "unet"]
    told = answer(capsys, *common, "--out", tmp_path / "auto", *options)
    assert answer(capsys, "reproduce", told["pictures"][0]["path"])["reproduced"] is True
    moved = shutil.copytree(tiny / "unet", tmp_path / "moved")
    found = answer(capsys, "reproduce", told["pictures"][0]["path"], "--weak-unet", moved)
    assert found["reproduced"] is True
    options = "--prior --prior-steps 2 --prior-guidance 1.5"
    told = answer(capsys, *common, "--out", tmp_path / "third", *options.split())
    wanted = {"prior": True, "prior_num_inference_steps": 2, "prior_guidance_scale": 1.5}
    assert {name: told["settings"][name] for name in wanted} == wanted


def test_a_filled_folder_is_left_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    common = ["generate", PROMPT, "-n", 1, "--steps", 1, "--seed", 0, "--model", tiny, "--out", out]
    assert answer(capsys, *common)["out"] == str(out), "an empty folder is used as it is"
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert answer(capsys, *common)["out"] == str(out / "002")
    assert answer(capsys, *common)["out"] == str(out / "003")
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_two_runs_at_once_take_two_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as first, output_folder(out) as second, output_folder(out) as third:
        assert (first, second, third) == (out, out / "002", out / "003")
        for folder in (first, second):
            (folder / "0001.png").write_bytes(b"")
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert left == ["0001.png", "002", "002/0001.png", "003"], "nothing hidden stays"


def test_generate_tells_people_pictures_sheet_and_scores(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", PROMPT, "-n", "3", "--keep", "2", "--seed", "0", "--model", str(tiny), "--out"]
    assert command.main([*common, str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("score" in line and "seed" in line and ".png" in line for line in lines[:2])
    assert "sheet.png" in lines[2]
    assert " s " in lines[3] and "peak memory" in lines[3]
    assert command.main([*common, str(tmp_path / "b"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [Path(line).parent for line in printed.out.splitlines()] == [tmp_path / "b"] * 2
    assert all(Path(line).exists() for line in printed.out.splitlines())


def test_without_rerank_all_are_kept_as_drawn(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "generate",
        PROMPT,
        "-n",
        6,
        "--seed",
        3,
        "--model",
        tiny,
        "--out",
        tmp_path / "out",
        "--no-rerank",
    ]
    told = answer(capsys, *common)
    assert [(one["seed"], one["score"]) for one in told["pictures"]] == [(3 + k, None) for k in range(6)]
    assert "--no-rerank" in refused(capsys, *common, "--keep", 2)


def test_words_the_model_never_saw_are_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of(tiny, tmp_path)
    card = json.loads((model / "unclip.json").read_text())
    card |= {"knows": "Circles, above all.", "words": PROMPT.split()}
    (model / "unclip.json").write_text(json.dumps(card))
    common = ["-n", 1, "--steps", 1, "--model", model, "--out", tmp_path / "out"]
    told = answer(capsys, "generate", "a Photo of a red dog", *common)
    assert told["unknown_words"] == ["photo", "of", "dog"]
    assert "photo, of, dog" in told["note"] and "Circles, above all" in told["note"] and "--model" in told["note"]
    assert Path(told["pictures"][0]["path"]).exists(), "it paints all the same"
    command.main(["generate", "a dog", *map(str, common)])
    assert "has never seen: dog" in capsys.readouterr().err
    told = answer(capsys, "generate", PROMPT, *common)
    assert (told["unknown_words"], told["note"]) == ([], None)
    assert [one["seed"] for one in told["pictures"]] == [0], "the same command paints the same picture"


def test_ignored_settings_are_told_in_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", PROMPT, "-n", "1", "--no-prior", "--prior-steps", "3", "--quiet"]
    assert command.main([*arguments, "--model", str(tiny), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "unclip generate: --prior-steps is ignored: the prior is off\n"


MISTAKES = {
    "unknown model": ("--model nowhere", "'nowhere' is unknown"),
    "model path without a model": ("--model /", "model_index.json"),
    "unknown hub id": ("--model nobody/nothing", "cannot be fetched"),
    "a file of another kind": ("--model pyproject.toml", "is not a .safetensors file"),
    "unknown sampler": ("--sampler eular", "sampler 'eular' is unknown; choose from: "),
    "keep more than n": ("-n 4 --keep 5", "--keep 5 is more than -n 4"),
    "keep none": ("--keep 0", "--keep 0 is out of range; give a whole number of 1 or more"),
    "paint none": ("-n 0", "-n 0 is out of range"),
    "no steps": ("--steps 0", "--steps 0 is out of range; give a whole number from 1 to 1000"),
    "too many steps": ("--steps 1001", "--steps 1001 is"),
    "no prior steps": ("--prior-steps 0", "--prior-steps 0 is"),
    "no layers left": ("--clip-skip 99", "--clip-skip 99 is out of range"),
    "no such noise": ("--noise-level -1", "--noise-level -1 is out of range"),
    "odd width": ("--width 60", "--width 60 cannot be halved into latents; give a multiple of 8"),
    "absurd width": ("--width 800000", "--width 800000 is out of range; give a whole number from 1 to 16384"),
    "no height": ("--height 0", "--height 0 is out of range"),
    "negative seed": ("--seed -1", "--seed -1 is out of range"),
    "too large a seed": ("--seed 4294967296", "--seed 4294967296 is out of range"),
    "guidance below one": ("--guidance 0.5", "--guidance 0.5 is out of range"),
    "guidance not a number": ("--guidance nan", "--guidance nan is"),
    "guidance beyond all numbers": ("-n 2 --guidance 1e38", "numbers that are not finite; lower --guidance 1e+38"),
    "eta above one": ("--eta 2", "--eta 2.0 is out of range; give a number from 0 to 1"),
    "unknown attention": ("--attention flsh", "attention 'flsh' is unknown; choose from: auto, sdpa, flash, cudnn"),
    "attention of another device": ("--attention cudnn", "attention 'cudnn' does not run in float32 on cpu"),
    "churn of another sampler": ("--sampler ddim --s-churn 1", "--s-churn 1.0, but sampler 'ddim' takes none"),
    "churn and eta": ("--sampler euler --eta 1 --s-churn 1", "--eta 1.0 and --s-churn 1.0 were both given"),
    "unknown rule": ("--guidance-rule apq", "--guidance-rule 'apq' is unknown; choose from: cfg, cfg_zero, apg"),
    "autoguidance alone": (
        "--guidance-rule autoguidance",
        "needs a weaker UNet; load the model with --weak-unet FOLDER",
    ),
    "weaker network that is not there": ("--weak-unet nowhere", "--weak-unet: folder 'nowhere' does not exist"),
    "network for drafts that is not there": ("--draft-unet nowhere", "--draft-unet: folder 'nowhere' does not exist"),
    "a scale that is none": ("--lora bad.safetensors:x", "--lora 'bad.safetensors:x': 'x' is no scale; give a number"),
    "an adapter's scale that is none": ("--ip-adapter a.safetensors:2,5 --ip-image a.png", "'2,5' is no scale"),
    "an adapter without a picture": ("--ip-adapter a.safetensors", "--ip-adapter and --ip-image go together"),
    "a colon of the path's own": ("--lora bad:folder/a.safetensors", "LoRA 'bad:folder/a.safetensors' "),
    "rule's number": ("--guidance-rule apg --apg-eta 2", "--apg-eta 2.0 is out of range; give a number from 0 to 1"),
    "interval upside down": ("--guidance-interval 3 1", "--guidance-interval (3.0, 1.0) is upside down"),
    "strength alone": (
        "--strength 0.5",
        "--strength was given without --image; give the picture as well",
    ),
    "steps in words": ("--steps many", "--steps"),
    "unknown option": ("--stpes 3", "--stpes"),
}


@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_writes_nothing(
    options: str, words: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    said = refused(capsys, "generate", PROMPT, "--model", tiny, "--out", out, *options.split(), "--json")
    assert words in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prompt", ["", "  \t\n"])
def test_an_empty_prompt_is_refused(
    prompt: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "generate", prompt, "--model", tiny, "--out", tmp_path / "out")
    assert "prompt is empty" in said and not (tmp_path / "out").exists()
    assert "PROMPT" in refused(capsys, "generate", "--out", tmp_path / "out")
    latin = os.fsdecode(b"ein gr\xfcner Kreis")  # as Python holds bytes that are not UTF-8
    assert "UTF-8" in refused(capsys, "generate", latin, "--model", tiny, "--out", tmp_path / "out")
    assert "UTF-8" in refused(capsys, "generate", PROMPT, "--sampler", latin, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil(model: Path, how: str) -> str:
    """Damage a model folder and return what must be named."""
    part, _, what = how.partition(" ")
    path = model / part
    if what == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text('{"half": ')
    return path.name


@pytest.mark.parametrize(
    "how",
    [
        "model_index.json missing",
        "model_index.json damaged",
        "unet missing",
        "unet/diffusion_pytorch_model.safetensors missing",
        "unet/diffusion_pytorch_model.safetensors cut",
        "vae/config.json damaged",
        "clip/model.safetensors cut",
        "scheduler/scheduler_config.json missing",
        "unclip.json damaged",
    ],
)
def test_a_damaged_model_is_named(how: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of(tiny, tmp_path)
    name = spoil(model, how)
    said = refused(capsys, "generate", PROMPT, "--model", model, "--out", tmp_path / "out")
    part = how.partition(" ")[0].partition("/")[0]
    assert name in said or part in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/unclip")):
        said = refused(capsys, "generate", PROMPT, "--model", "nowhere", "--out", out)
        assert f"out folder '{out}' cannot be written" in said and "--out" in said, "found before the model was"
    assert file.read_text() == "mine"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if not os.access(closed, os.W_OK):  # root may write anywhere
        assert "cannot be written" in refused(capsys, "generate", PROMPT, "--model", tiny, "--out", closed / "out")


def heed_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("seconds", [0.0, 6.0])  # while libraries load, and about when it paints
def test_interrupted_leaves_whole_files_only(seconds: float, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["generate", PROMPT, "-n", "64", "--steps", "900", "--model", str(tiny), "--out", str(out)]
    process = subprocess.Popen(
        [*UNCLIP, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        deadline = time.monotonic() + 300  # generous: only a busy machine needs it
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "unclip generate: interrupted" and "Traceback" not in said
    assert not out.exists(), "nothing was painted yet, so not even the folder stays"


# A verb whose process says when it has painted a picture, and then waits for what comes of it.
PAINTS = """
import sys
from gen import cli, command
from gen.flight import Flight

def paint(self, *given):
    noted(self, *given)
    print("painted", file=sys.stderr, flush=True)

noted, Flight.paint = Flight.paint, paint
sys.exit(command.main())
"""


@pytest.mark.parametrize("words", [[], ["--json"], ["--quiet", "-n", "4000", "--keep", "2"]])
def test_interrupted_writes_what_is_painted(words: list[str], tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["generate", PROMPT, "--budget", "600", "--steps", "50", "--model", str(tiny), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", PAINTS, *arguments, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "painted\n":
                break
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=300)
    finally:
        process.kill()
    *others, last = said.splitlines()
    assert process.returncode == 130 and set(others) <= {"painted"}, said
    told = re.fullmatch(r"unclip generate: interrupted with (\d+)( of 4000)? candidates painted", last)
    assert told is not None and (told[2] is not None) == ("-n" in words), last
    number = int(told[1])
    names = sorted(path.name for path in out.iterdir())
    pictures = [out / name for name in names if name != "sheet.png"]
    assert len(names) == len(pictures) + 1 and len(pictures) == min(number, 2 if "--keep" in words else 4)
    scores = [read_png(path)[1]["score"] for path in pictures]
    assert scores == sorted(scores, reverse=True)
    if "--json" in words:
        answer = json.loads(printed)
        assert answer["interrupted"] is True and len(answer["candidates"]) == number
        assert [each["path"] for each in answer["pictures"]] == [str(path) for path in pictures]
    else:
        assert [line.split()[0] for line in printed.splitlines()][: len(pictures)] == [str(path) for path in pictures]
    assert command.main(["reproduce", str(pictures[0])]) == 0


def test_interrupted_while_it_writes_leaves_all_files_and_the_answer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **words: Any) -> Image.Image:
        signal.raise_signal(signal.SIGINT)
        return sheet_of(*given, **words)

    sheet_of = cli.contact_sheet
    monkeypatch.setattr(cli, "contact_sheet", interrupted)
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    asked = ("generate", PROMPT, "-n", "3", "--keep", "2", "--model", tiny, "--out", out)
    told = answer(capsys, *asked, status=130)
    assert told["interrupted"] is True and len(told["candidates"]) == 3
    assert {path.name for path in out.iterdir()} == {*(Path(one["path"]).name for one in told["pictures"]), "sheet.png"}
    assert signal.getsignal(signal.SIGINT) is before
    assert command.main([str(each) for each in (*asked[:-1], tmp_path / "other")]) == 130
    assert capsys.readouterr().err == "unclip generate: interrupted with 3 of 3 candidates painted\n"


def test_interrupted_inside_an_exec_ends_with_the_same_status(tmp_path: Path) -> None:
    """Libraries make classes by exec of text; CPython keeps a Ctrl-C that came meanwhile, though it was caught."""
    module = (
        "import signal\n\ndef verb() -> None:\n    exec('signal.raise_signal(signal.SIGINT)', {'signal': signal})\n"
    )
    (tmp_path / "interrupting.py").write_text(module)
    installed = tmp_path / "interrupting-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: interrupting\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[{command.GROUP}]\ninterrupted: ends by Ctrl-C = interrupting:verb\n")
    done = subprocess.run(
        [*UNCLIP, "interrupted"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert (done.returncode, done.stderr) == (130, "unclip interrupted: interrupted\n")


def test_json_is_alone_on_standard_output(tiny: Path, tmp_path: Path) -> None:
    arguments = [
        "generate",
        PROMPT,
        "-n",
        "2",
        "--model",
        str(tiny),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run([*UNCLIP, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["pictures"]) == 2
    assert done.stderr == ""


# --- reproduce --------------------------------------------------------------------------------------------


def kept(folder: Path) -> Path:
    return min(folder.glob("0001-*.png"))


def test_reproduce_paints_the_same_picture(painted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "reproduce", kept(painted))
    assert told["reproduced"] is True and told["largest_difference"] <= 1
    assert told["record"]["prompt"] == PROMPT
    assert command.main(["reproduce", str(kept(painted))]) == 0
    assert "largest pixel difference" in capsys.readouterr().out


def rewrite(source: Path, target: Path, record: dict[str, Any], picture: Image.Image | None = None) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("unclip", json.dumps(record))
    (picture or Image.open(source)).save(target, pnginfo=chunks)
    return target


def test_reproduce_finds_a_changed_picture(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, record = read_png(kept(painted))
    pixels = np.asarray(picture).copy()
    pixels[3, 5, 1] = (int(pixels[3, 5, 1]) + 100) % 256
    changed = rewrite(kept(painted), tmp_path / "changed.png", record, Image.fromarray(pixels))
    told = answer(capsys, "reproduce", changed, status=1)
    assert told["reproduced"] is False and told["largest_difference"] >= 100
    told = answer(
        capsys,
        "reproduce",
        rewrite(changed, tmp_path / "seed.png", record | {"seed": record["seed"] + 1}),
        status=1,
    )
    assert told["largest_difference"] > 1, "another seed is another picture"


def test_reproduce_computes_as_it_was_painted(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = kept(painted)
    _, record = read_png(source)
    assert (record["dtype"], record["attention"]) == ("float32", "auto")
    lower = rewrite(source, tmp_path / "lower.png", record | {"dtype": "bfloat16"})
    assert answer(capsys, "reproduce", lower, status=1)["largest_difference"] > 1  # it was float32
    other = rewrite(source, tmp_path / "other.png", record | {"attention": "math"})
    assert answer(capsys, "reproduce", other)["reproduced"] is True
    elsewhere = rewrite(source, tmp_path / "elsewhere.png", record | {"attention": "cudnn"})
    assert command.main(["reproduce", str(elsewhere)]) == 0
    assert "attention 'cudnn' does not run here" in capsys.readouterr().err


def test_reproduce_follows_precision_and_runtime(
    painted: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", PROMPT, "-n", "1", "--no-rerank", "--steps", "2", "--dtype", "bfloat16", "--model", tiny]
    half = Path(answer(capsys, *asked, "--out", tmp_path / "half")["pictures"][0]["path"])
    _, record = read_png(half)
    assert (record["dtype"], record["runtime"]) == ("bfloat16", "torch")
    assert answer(capsys, "reproduce", half)["reproduced"] is True
    unknown = rewrite(half, tmp_path / "unknown.png", record | {"runtime": "onnx"})
    assert "runtime 'onnx' is unknown" in refused(capsys, "reproduce", unknown)
    elsewhere = rewrite(kept(painted), tmp_path / "elsewhere.png", read_png(kept(painted))[1] | {"runtime": "openvino"})
    assert answer(capsys, "reproduce", elsewhere, "--runtime", "torch")["reproduced"] is True


def test_reproduce_asks_for_the_clip_that_painted(
    painted: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in ((3, "clip"), (3, "moved"), (4, "other")):
        make_tiny_clip(tmp_path / name, seed=seed)
    asked = ["generate", PROMPT, "-n", "1", "--steps", "2", "--model", tiny, "--clip", tmp_path / "clip"]
    guided = ["--clip-guidance-scale", "5", "--out", tmp_path / "guided"]
    picture = Path(answer(capsys, *asked, *guided)["pictures"][0]["path"])
    assert answer(capsys, "reproduce", picture)["reproduced"] is True
    (tmp_path / "clip").rename(tmp_path / "gone")
    assert "is no folder; give a CLIP folder" in refused(capsys, "reproduce", picture)
    assert answer(capsys, "reproduce", picture, "--clip", tmp_path / "moved")["reproduced"] is True
    assert "painted by CLIP" in refused(capsys, "reproduce", picture, "--clip", tmp_path / "other")
    said = refused(capsys, "reproduce", kept(painted), "--clip", tmp_path / "moved")
    assert "CLIP ranked" in said and "leave it out" in said
    ranked = Path(answer(capsys, *asked[:-1], tmp_path / "moved", "--out", tmp_path / "ranked")["pictures"][0]["path"])
    (tmp_path / "moved").rename(tmp_path / "lost")
    assert answer(capsys, "reproduce", ranked)["reproduced"] is True  # which no CLIP painted


def test_reproduce_refuses_what_it_cannot_repaint(
    painted: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = kept(painted)
    _, record = read_png(source)
    assert "does not exist" in refused(capsys, "reproduce", tmp_path / "none.png")
    assert "holds no unclip record" in refused(capsys, "reproduce", painted / "sheet.png")
    for name in ("prompt", "seed", "settings", "model", "model_hash"):
        lacking = {key: value for key, value in record.items() if key != name}
        said = refused(capsys, "reproduce", rewrite(source, tmp_path / f"no-{name}.png", lacking))
        assert f"no {name}" in said or f"no '{name}'" in said
        assert said.count(f"no-{name}.png") == 1, "it says which file's record that is, once"
    for name, damage in (
        *(("settings", [1]), ("weak_unet", 3), ("clip", {}), ("clip_hash", 1), ("noise_path", 7)),
        *(("attention", 5), ("dtype", "float3"), ("runtime", 2)),
    ):
        said = refused(capsys, "reproduce", rewrite(source, tmp_path / f"{name}.png", record | {name: damage}))
        assert "is damaged: its " in said
    later = rewrite(source, tmp_path / "later.png", record | {"version": 2})
    assert "the record is of version 2, and here 1 is the last" in refused(capsys, "reproduce", later)
    gone = rewrite(source, tmp_path / "gone.png", record | {"model": "nowhere"})
    assert "'nowhere' is unknown" in refused(capsys, "reproduce", gone)
    assert answer(capsys, "reproduce", gone, "--model", tiny)["reproduced"] is True
    other = make_tiny_stable_unclip(tmp_path / "other", seed=1)
    assert "hash" in refused(capsys, "reproduce", source, "--model", other)
    (tmp_path / "cut.png").write_bytes(source.read_bytes()[:400])
    assert "cannot be read" in refused(capsys, "reproduce", tmp_path / "cut.png")


# --- score ------------------------------------------------------------------------------------------------


def test_score_is_what_ranked_the_picture(painted: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(painted.glob("0*.png"))
    told = answer(capsys, "score", first, PROMPT, "a star", "--image", second, "--model", tiny)
    assert [(Path(one["image"]), one["text"]) for one in told["scores"]] == [
        (path, text) for path in (first, second) for text in (PROMPT, "a star")
    ]
    for path, one in ((first, told["scores"][0]), (second, told["scores"][2])):
        assert one["score"] == pytest.approx(read_png(path)[1]["score"], abs=1e-4)
    only_clip = answer(capsys, "score", first, PROMPT, "--model", tiny / "clip")
    assert only_clip["scores"][0]["score"] == pytest.approx(told["scores"][0]["score"], abs=1e-6)
    assert command.main(["score", str(first), PROMPT, "--model", str(tiny)]) == 0
    assert PROMPT in capsys.readouterr().out


def test_all_files_that_come_first_are_pictures(painted: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(painted.glob("0*.png"))
    words = "a text far too long for the name of a file " * 9
    told = answer(capsys, "score", *files, PROMPT, words, "--model", tiny)["scores"]
    assert [(Path(one["image"]), one["text"]) for one in told] == [(path, t) for path in files for t in (PROMPT, words)]
    (alone,) = answer(capsys, "score", "-i", files[0], PROMPT, "--model", tiny)["scores"]
    assert alone["score"] == pytest.approx(told[0]["score"], abs=1e-6)
    asked = ("--model", tiny)
    assert "no text is given" in refused(capsys, "score", *files, *asked)
    assert "no picture is given, for 'a star' is no file" in refused(capsys, "score", "a star", PROMPT, *asked)
    assert "stands behind a text" in refused(capsys, "score", files[0], PROMPT, files[1], *asked)
    gone = painted / "gone.png"
    assert f"'{gone}' does not exist" in refused(capsys, "score", files[0], gone, PROMPT, *asked)


def test_score_refuses_what_it_cannot_read(
    painted: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = kept(painted)
    assert "does not exist" in refused(capsys, "score", tmp_path / "none.png", PROMPT, "--model", tiny)
    (tmp_path / "cut.png").write_bytes(first.read_bytes()[:400])
    assert "cannot be read" in refused(capsys, "score", tmp_path / "cut.png", PROMPT, "--model", tiny)
    assert "text is empty" in refused(capsys, "score", first, PROMPT, " ", "--model", tiny)
    assert "nowhere" in refused(capsys, "score", first, PROMPT, "--model", "nowhere")
    assert "TEXT" in refused(capsys, "score", first)
    model = copy_of(tiny, tmp_path)
    shutil.rmtree(model / "clip")
    assert "no clip/" in refused(capsys, "score", first, PROMPT, "--model", model)


# --- info -------------------------------------------------------------------------------------------------


def test_info_counts_what_the_files_hold(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "info", tiny)
    assert told["family"] == "StableUnCLIPPipeline"
    for part in ("unet", "vae", "prior", "text_encoder", "clip"):
        (file,) = (tiny / part).glob("*.safetensors")
        assert told["parts"][part]["parameters"] == sum(t.numel() for t in load_file(file).values())
    assert told["parameters"] == sum(part["parameters"] for part in told["parts"].values())
    assert told["bytes"] == sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file())
    assert told["parts"]["scheduler"]["parameters"] == 0


def test_info_tells_what_the_card_tells(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of(tiny, tmp_path)
    card = json.loads((model / "unclip.json").read_text())
    card["scores"] = {"one object right": {"all": 0.97, "best of 16": 0.99}}
    card["training"] = {"clip": {"recipe": "shapes/clip.yaml", "hardware": "2 cores", "seconds": 3600}}
    (model / "unclip.json").write_text(json.dumps(card))
    assert command.main(["info", str(model)]) == 0
    text = capsys.readouterr().out
    for word in ("unet", "parameters", "shapes/clip.yaml", "2 cores", "3600", "best of 16: 0.99", "knows"):
        assert word in text
    told = answer(capsys, "info", model)
    assert told["card"]["training"] == card["training"]


def test_info_and_the_pictures_name_one_hash(painted: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "info", tiny)["hash"] == read_png(kept(painted))[1]["model_hash"]


def test_parts_that_nothing_uses_are_in_no_hash(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of(tiny, tmp_path)
    index = json.loads((model / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "feature_extractor").mkdir()
    (model / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    told = answer(capsys, "info", model)
    assert told["hash"] == answer(capsys, "info", tiny)["hash"] and "feature_extractor" not in told["parts"]


def test_info_refuses_unknown_and_damaged_models(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'nowhere' is unknown" in refused(capsys, "info", "nowhere")
    model = copy_of(tiny, tmp_path)
    spoil(model, "unet/diffusion_pytorch_model.safetensors cut")
    assert "unet" in refused(capsys, "info", model)
    spoil(model, "unet missing")
    assert f"'{model / 'unet'}' is missing" in refused(capsys, "info", model)
    spoil(model, "model_index.json damaged")
    assert "model_index.json" in refused(capsys, "info", model)
