"""The dispatcher: a wrong verb is told with the right ones, and the exit status tells who erred."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest
import torch

from gen import command


def test_a_wrong_verb_is_told_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["paint", "a circle"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'paint' is unknown" in printed.err and "generate" in printed.err and printed.err.count("\n") == 1
    assert command.main([]) == 2
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == "unclip 0.1.0\n"


def verb_that_fails(how: str) -> None:
    """A verb that fails in one of the ways that a verb can."""
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
