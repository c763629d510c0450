"""`unclip batch`: a file of prompts into a folder, whatever ends it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gen import command
from gen.picture import read_png
from tests.typed import ROOT, UNCLIP, answer, heed_interrupts, refused

FEW = ("--steps", "3", "-n", "3", "--keep", "1")


def manifest(folder: Path, number: int = 3) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"a red star of {place} circles\n" for place in range(number)), "utf-8")
    return path


def lines_of(out: Path) -> list[int]:
    return [json.loads(line)["line"] for line in (out / "results.jsonl").read_text("utf-8").splitlines()]


def test_one_object_tells_what_was_done(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ("batch", manifest(tmp_path), "--model", tiny_folder, "--out", out, *FEW)
    printed = answer(capsys, *asked)
    assert printed["out"] == str(out) and printed["results"] == str(out / "results.jsonl")
    assert (printed["lines"], printed["before"], printed["painted"], printed["failed"]) == (3, 0, 3, 0)
    assert (printed["candidates"], printed["pictures"], printed["interrupted"]) == (9, 3, False)
    assert printed["seconds"]["total"] >= printed["seconds"]["load"] > 0
    assert sorted(lines_of(out)) == [1, 2, 3]
    (first, *_) = sorted((out / "pictures" / "000").iterdir())
    assert read_png(first)[1]["settings"]["num_inference_steps"] == 3
    assert command.main(["reproduce", str(first)]) == 0
    again = answer(capsys, *asked)
    assert (again["before"], again["painted"]) == (3, 0)


def test_for_people(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["batch", str(manifest(tmp_path)), "--model", str(tiny_folder), "--out", str(out), *FEW]
    assert command.main([*asked, "--part", "1/2", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}/results-1of2.jsonl  2 of 2 lines painted: 6 candidates, 2 pictures kept, in ")
    assert printed.err == ""
    assert command.main(asked) == 0
    assert "results.jsonl  1 of 3 lines painted, 2 before: 3 candidates, 1 picture kept, " in capsys.readouterr().out


def test_lines_that_fail_are_told(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "a star"}\n{"prompt": "a star", "guidance_scale": 1e38}\n', "utf-8")
    status = command.main(["batch", str(path), "--model", str(tiny_folder), "--out", str(out), *FEW])
    printed = capsys.readouterr()
    assert status == 1 and "1 of 2 lines painted" in printed.out
    assert printed.err == f"unclip batch: 1 of 2 lines failed; {out}/results.jsonl says why\n"


MISTAKES = {
    "no such file": (("nowhere.txt",), "manifest 'nowhere.txt' cannot be read (No such file or directory)"),
    "another kind of file": (("pyproject.toml",), "is of no known format; give a file that ends in .jsonl or .txt"),
    "part of none": (("PROMPTS", "--part", "3"), "--part '3' is not K/N; give which of how many, as 2/8"),
    "part beyond": (("PROMPTS", "--part", "3/2"), "part 3/2 is out of range; give which of how many"),
    "an option's mistake": (("PROMPTS", "--steps", "0"), "batch: --steps 0 is out of range"),
    "seconds": (("PROMPTS", "--budget", "5"), "No such option: --budget"),
    "no model": (("PROMPTS", "--model", "nowhere"), "'nowhere' is unknown"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_writes_nothing(
    words: tuple[str, ...],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    path, out = manifest(tmp_path), tmp_path / "out"
    typed = [str(path) if word == "PROMPTS" else word for word in words]
    model = [] if "--model" in typed else ["--model", str(tiny_folder)]
    assert message in refused(capsys, "batch", *typed, *model, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ended_in_the_middle_it_goes_on(
    how: signal.Signals, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number, out = 400, tmp_path / "out"
    asked = ["batch", str(manifest(tmp_path, number)), "--model", str(tiny_folder), "--out", str(out), *FEW]
    process = subprocess.Popen(
        [*UNCLIP, *asked],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        deadline = time.monotonic() + 300  # generous: only a busy machine needs it
        while not ((out / "results.jsonl").exists() and lines_of(out)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    whole = (out / "results.jsonl").read_bytes().rfind(b"\n") + 1
    before = (out / "results.jsonl").read_bytes()[:whole].count(b"\n")
    assert 0 < before < number
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1] == "unclip batch: interrupted; the same command goes on from here"
        assert f"{before} of {number} lines painted" in printed
        assert whole == (out / "results.jsonl").stat().st_size, "no line is half written"
    report = answer(capsys, *asked)
    assert (report["before"], report["painted"]) == (before, number - before)
    assert sorted(lines_of(out)) == list(range(1, number + 1))
    assert len(list((out / "pictures").rglob("*"))) == number + 1
