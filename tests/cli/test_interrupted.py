"""Ctrl-C: what is painted is written, nothing half-done is left, and the exit status says so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gen import cli, command
from gen.picture import read_png
from tests.typed import PROMPT, ROOT, UNCLIP, answer, heed_interrupts


@pytest.mark.parametrize("seconds", [0.0, 6.0])  # while libraries load, and about when it paints
def test_interrupted_leaves_whole_files_only(seconds: float, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["generate", PROMPT, "-n", "64", "--steps", "900", "--model", str(tiny_folder), "--out", str(out)]
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
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "unclip generate: interrupted" and "Traceback" not in errors
    assert not out.exists(), "nothing was painted yet, so not even the folder stays"


# The command, which says on standard error when it has painted a picture.
PAINTS = """
import sys
from gen import command
from gen.flight import Flight

def paint(self, *given):
    noted(self, *given)
    print("painted", file=sys.stderr, flush=True)

noted, Flight.paint = Flight.paint, paint
sys.exit(command.main())
"""


@pytest.mark.parametrize("words", [[], ["--json"], ["--quiet", "-n", "4000", "--keep", "2"]])
def test_interrupted_writes_what_is_painted(words: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["generate", PROMPT, "--budget", "600", "--steps", "50", "--model", str(tiny_folder), "--out", str(out)]
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
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    *others, last = errors.splitlines()
    assert process.returncode == 130 and set(others) <= {"painted"}, errors
    matched = re.fullmatch(r"unclip generate: interrupted with (\d+)( of 4000)? candidates painted", last)
    assert matched is not None and (matched[2] is not None) == ("-n" in words), last
    number = int(matched[1])
    names = sorted(path.name for path in out.iterdir())
    pictures = [out / name for name in names if name != "sheet.png"]
    assert len(names) == len(pictures) + 1 and len(pictures) == min(number, 2 if "--keep" in words else 4)
    scores = [read_png(path)[1]["score"] for path in pictures]
    assert scores == sorted(scores, reverse=True)
    if "--json" in words:
        found = json.loads(printed)
        assert found["interrupted"] is True and len(found["candidates"]) == number
        assert [each["path"] for each in found["pictures"]] == [str(path) for path in pictures]
    else:
        assert [line.split()[0] for line in printed.splitlines()][: len(pictures)] == [str(path) for path in pictures]
    assert command.main(["reproduce", str(pictures[0])]) == 0


def test_interrupted_while_it_writes_leaves_all_files_and_the_answer(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **words: Any) -> Image.Image:
        signal.raise_signal(signal.SIGINT)
        return sheet_of(*given, **words)

    sheet_of = cli.contact_sheet
    monkeypatch.setattr(cli, "contact_sheet", interrupted)
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    asked = ("generate", PROMPT, "-n", "3", "--keep", "2", "--model", tiny_folder, "--out", out)
    printed = answer(capsys, *asked, status=130)
    assert printed["interrupted"] is True and len(printed["candidates"]) == 3
    assert {path.name for path in out.iterdir()} == {
        *(Path(one["path"]).name for one in printed["pictures"]),
        "sheet.png",
    }
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
