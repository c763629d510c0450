"""Commands as people type them: the one answer, or the one line that refuses."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from gen import command

ROOT = Path(__file__).resolve().parent.parent
UNCLIP = [sys.executable, "-m", "gen.command"]  # what the installed script runs
PROMPT = "a red circle above a blue square"


def heed_interrupts() -> None:
    """First in a command's process: a shell starts background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> Any:
    """Run a verb with --json and return the one object on standard output."""
    capsys.readouterr()
    got = command.main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert got == status, printed.err
    assert printed.out.count("\n") == 1, "one object on one line"
    return json.loads(printed.out)


def refused(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str | Path) -> str:
    """Run a verb that must refuse ("data shapes" is one too), and return the one line it says."""
    capsys.readouterr()
    status = command.main([*verb.split(), *map(str, arguments)])
    printed = capsys.readouterr()
    assert status == 2, printed.err
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"unclip {verb}: "), printed.err
    return printed.err
