"""`unclip generate`: what it paints, writes and says."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from gen import command
from gen.picture import read_png
from tests.stock import edited
from tests.typed import PROMPT, ROOT, UNCLIP, answer, refused


def test_generate_writes_the_best_and_a_sheet_of_all(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    printed = answer(capsys, "generate", PROMPT, "-n", 6, "--seed", 10, "--model", tiny_folder, "--out", out)
    paths = [Path(one["path"]) for one in printed["pictures"]]
    assert sorted(path.name for path in out.iterdir()) == sorted([*(path.name for path in paths), "sheet.png"])
    assert len(paths) == 4, "the best four are kept unless told otherwise"
    scores = [one["score"] for one in printed["candidates"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 6
    assert {one["seed"] for one in printed["candidates"]} == set(range(10, 16))
    assert [one["kept"] for one in printed["candidates"]] == [True] * 4 + [False] * 2
    for rank, (path, one) in enumerate(zip(paths, printed["candidates"], strict=False), 1):
        picture, record = read_png(path)
        assert path.name == f"{rank:04d}-seed{one['seed']}.png"
        assert picture.size == (64, 64)
        assert (record["prompt"], record["seed"], record["score"]) == (PROMPT, one["seed"], one["score"])
        assert record["settings"] == printed["settings"] and record["settings"]["num_inference_steps"] == 4
        assert record["model_hash"] == printed["model"]["hash"] and len(record["model_hash"]) == 64
    with Image.open(printed["sheet"]) as sheet:
        assert sheet.width > 4 * 64 and sheet.height > 2 * 64
    assert printed["seconds"]["total"] > 0 and printed["interrupted"] is False
    assert printed["peak_memory_bytes"]["host"] > 10**8, "torch alone is more"


def test_a_seed_paints_the_same_pictures_and_settings_reach_the_painter(
    tiny_folder: Path, painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", PROMPT, "-n", 6, "--keep", 2, "--seed", 10, "--model", tiny_folder]
    printed = answer(capsys, *common, "--out", tmp_path / "same")
    for one in printed["pictures"]:
        path = Path(one["path"])
        assert path.read_bytes() == (painted / path.name).read_bytes()
    options = "--steps 3 --guidance 2.5 --sampler euler --eta 0.5 --no-prior --negative blue"
    options += " --width 32 --height 128"
    printed = answer(capsys, *common, "--out", tmp_path / "other", *options.split())
    wanted = {"num_inference_steps": 3, "guidance_scale": 2.5, "sampler": "euler", "prior": False, "eta": 0.5}
    wanted |= {"negative_prompt": "blue", "width": 32, "height": 128}
    assert {name: printed["settings"][name] for name in wanted} == wanted
    with Image.open(printed["pictures"][0]["path"]) as picture:
        assert picture.size == (32, 128)
    options = "--sampler heun --s-churn 2 --s-tmin 0.1 --s-tmax 9 --s-noise 1.01"
    printed = answer(capsys, *common, "--out", tmp_path / "churned", *options.split())
    wanted = {"sampler": "heun", "s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}
    assert {name: printed["settings"][name] for name in wanted} == wanted
    assert answer(capsys, "reproduce", printed["pictures"][0]["path"])["reproduced"] is True
    printed = answer(capsys, *common, "--out", tmp_path / "climbed", "--clip-guidance-scale", 0.5)
    assert printed["settings"]["clip_guidance_scale"] == 0.5
    options = "--guidance-rule apg --apg-eta 0.5 --apg-norm-threshold 3 --apg-momentum 0.1 --guidance-rescale 0.2"
    options += " --guidance-interval 0.1 9 --thresholding 4 --dynamic-thresholding-ratio 0.9"
    printed = answer(capsys, *common, "--out", tmp_path / "guided", *options.split())
    wanted = {"guidance_rule": "apg", "apg_eta": 0.5, "apg_norm_threshold": 3.0, "apg_momentum": 0.1}
    wanted |= {"guidance_rescale": 0.2, "guidance_interval": [0.1, 9.0]}
    wanted |= {"thresholding": 4.0, "dynamic_thresholding_ratio": 0.9}
    assert {name: printed["settings"][name] for name in wanted} == wanted
    assert answer(capsys, "reproduce", printed["pictures"][0]["path"])["reproduced"] is True
    options = ["--guidance-rule", "autoguidance", "--weak-unet", tiny_folder / "unet"]
    printed = answer(capsys, *common, "--out", tmp_path / "auto", *options)
    assert answer(capsys, "reproduce", printed["pictures"][0]["path"])["reproduced"] is True
    moved = shutil.copytree(tiny_folder / "unet", tmp_path / "moved")
    found = answer(capsys, "reproduce", printed["pictures"][0]["path"], "--weak-unet", moved)
    assert found["reproduced"] is True
    options = "--prior --prior-steps 2 --prior-guidance 1.5"
    printed = answer(capsys, *common, "--out", tmp_path / "third", *options.split())
    wanted = {"prior": True, "prior_num_inference_steps": 2, "prior_guidance_scale": 1.5}
    assert {name: printed["settings"][name] for name in wanted} == wanted


def test_generate_tells_people_pictures_sheet_and_scores(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", PROMPT, "-n", "3", "--keep", "2", "--seed", "0", "--model", str(tiny_folder), "--out"]
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


def test_json_is_alone_on_standard_output(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", PROMPT, "-n", "2", "--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run([*UNCLIP, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["pictures"]) == 2
    assert done.stderr == ""


def test_without_rerank_all_are_kept_as_drawn(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", PROMPT, "-n", 6, "--seed", 3, "--no-rerank"]
    common += ["--model", tiny_folder, "--out", tmp_path / "out"]
    printed = answer(capsys, *common)
    assert [(one["seed"], one["score"]) for one in printed["pictures"]] == [(3 + k, None) for k in range(6)]
    assert "--no-rerank" in refused(capsys, *common, "--keep", 2)


def test_words_the_model_never_saw_are_told(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(own_folder / "unclip.json", knows="Circles, above all.", words=PROMPT.split())
    common = ["-n", 1, "--steps", 1, "--model", own_folder, "--out", tmp_path / "out"]
    printed = answer(capsys, "generate", "a Photo of a red dog", *common)
    assert printed["unknown_words"] == ["photo", "of", "dog"]
    assert (
        "photo, of, dog" in printed["note"] and "Circles, above all" in printed["note"] and "--model" in printed["note"]
    )
    assert Path(printed["pictures"][0]["path"]).exists(), "it paints all the same"
    command.main(["generate", "a dog", *map(str, common)])
    assert "has never seen: dog" in capsys.readouterr().err
    printed = answer(capsys, "generate", PROMPT, *common)
    assert (printed["unknown_words"], printed["note"]) == ([], None)
    assert [one["seed"] for one in printed["pictures"]] == [0], "the same command paints the same picture"


def test_ignored_settings_are_told_in_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", PROMPT, "-n", "1", "--no-prior", "--prior-steps", "3", "--quiet"]
    assert command.main([*arguments, "--model", str(tiny_folder), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "unclip generate: --prior-steps is ignored: the prior is off\n"
