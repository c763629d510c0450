"""`--help` is quick, and says what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from gen import command
from tests.typed import ROOT


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
    printed: dict[str, str] = {}
    for words, paragraph in written_help([verb], typer.main.get_command(target)):
        if (typed := " ".join(words)) not in printed:
            assert command.main([*words, "--help"]) == 0
            printed[typed] = " ".join(capsys.readouterr().out.split())
        assert " ".join(paragraph.split()) in printed[typed]


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("generate", "score", "info", "reproduce", "train", "data", "evaluate"):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [verb]]
        assert len(line.split()) > 4
