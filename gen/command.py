"""The command `unclip`: finds a verb among the installed ones and runs it.

Owns: the list of verbs, the exit status and how an error is told. It must not know any verb, nor import
torch or typer before one is chosen, so that `unclip --help` answers at once.

A package joins a verb through the entry-point group `unclip.commands`. The entry's name is `VERB: help line`,
its value is `module:object`, where the object is a function that typer can read or a `typer.Typer`:

    [project.entry-points."unclip.commands"]
    "generate: Paint candidates of a sentence and keep the best" = "gen.cli:generate"

The help line is metadata of the installed distribution, so listing the verbs imports no module of theirs.

Exit status: 0 done; 2 the user's mistake, told in one line (typer's usage errors, and a ValueError that the
verb's own packages raised: by the rule of this code base that is what a user can cause); 130 interrupted;
1 anything else.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, NamedTuple

GROUP = "unclip.commands"
OWN_PACKAGES = frozenset({"samplers", "clip_core", "gen", "training"})

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130  # 130 = 128 + SIGINT, as shells report it


class Verb(NamedTuple):
    """One installed verb: its name, the line that `unclip --help` prints and where it lives."""

    name: str
    help: str
    entry: EntryPoint


def verbs() -> dict[str, Verb]:
    """Every installed verb by name, in the order of `unclip --help`; reads metadata only."""
    found = {}
    for entry in entry_points(group=GROUP):
        name, _, line = entry.name.partition(":")
        found[name.strip()] = Verb(name.strip(), line.strip(), entry)
    ours = [verb for verb in found.values() if verb.entry.module.partition(".")[0] in OWN_PACKAGES]
    theirs = [verb for verb in found.values() if verb not in ours]
    # What drives `gen` comes before what drives `training`, then other packages' verbs; each by name.
    return {verb.name: verb for part in (ours, theirs) for verb in sorted(part, key=lambda v: (v.entry.module, v.name))}


def help_text(installed: dict[str, Verb]) -> str:
    """What `unclip --help` prints."""
    width = max((len(name) for name in installed), default=0)
    lines = [f"  {verb.name:<{width}}  {verb.help}" for verb in installed.values()]
    return "\n".join(
        [
            "Usage: unclip VERB ...",
            "",
            "Words into pictures through CLIP: many candidates painted, the best kept.",
            "",
            "Verbs:",
            *lines,
            "",
            "unclip VERB --help tells a verb's options; unclip --version the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default `sys.argv[1:]`) and return its exit status; never raises, never exits."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    installed = verbs()
    if not argv:
        print(help_text(installed), file=sys.stderr)
        return MISTAKE
    name, rest = argv[0], argv[1:]
    if name in ("--help", "-h", "help"):
        return _print(help_text(installed))
    if name == "--version":
        return _print(f"unclip {version('unclip')}")
    if name not in installed:
        kind = "option" if name.startswith("-") else "verb"
        return _tell("unclip", f"{kind} {name!r} is unknown; choose from: {', '.join(installed)}", MISTAKE)
    return _run(installed[name], rest)


def _run(verb: Verb, arguments: list[str]) -> int:
    """Run a verb's typer command, with every way it can end turned into an exit status."""
    who = f"unclip {verb.name}"
    try:
        import typer  # after the verb is known: the list of verbs needs none of it

        target: Callable[..., Any] | typer.Typer = verb.entry.load()
        if not isinstance(target, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command()(target)
            target = app
        try:
            # Not typer's standalone mode, whose usage errors fill a box; here Exit comes back as a number.
            shown = _as_written(typer.main.get_command(target))
            program, who = who, " ".join([who, *_chosen(shown, arguments)])
            status = shown.main(arguments, prog_name=program, standalone_mode=False)
        except typer.TyperException as error:
            return _tell(who, f"{error.format_message()} (see {who} --help)", error.exit_code)
        except typer.Abort:  # of a verb that has said what it could still do
            return INTERRUPTED
        if status == INTERRUPTED:  # typer's word for Ctrl-C while the verb ran
            return _tell(who, "interrupted", INTERRUPTED)
        sys.stdout.flush()  # here, so that a reader who has left is met inside this try
        return status if isinstance(status, int) else DONE
    except KeyboardInterrupt:
        return _tell(who, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        return _left_alone()
    except Exception as error:
        own = OWN_PACKAGES | {_package(verb.entry)}
        if isinstance(error, ValueError) and _raised_in(error) in own:
            return _tell(who, str(error), MISTAKE)
        if isinstance(error, OSError):  # a full disk, a vanished folder: the line says it all
            return _tell(who, str(error), FAILED)
        traceback.print_exc()
        return _tell(who, f"failed with {type(error).__name__}: {error}", FAILED)


def _print(text: str) -> int:
    """Print what was asked for."""
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        return _left_alone()
    return DONE


def _left_alone() -> int:
    """The reader of standard output has left, as of `unclip ... | head`: keep the last flush quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _chosen(command: Any, arguments: Sequence[str]) -> list[str]:
    """The names of a group's commands that were typed: `shapes` of `unclip data shapes`."""
    below = getattr(command, "commands", {})
    if not arguments or arguments[0] not in below:
        return []
    return [arguments[0], *_chosen(below[arguments[0]], arguments[1:])]


def _as_written(command: Any) -> Any:
    """A typer command whose help is shown as its source has it: square brackets are themselves, lines are joined.

    typer has rich read them as markup, which leaves `[word]` out, and keeps the line breaks of a docstring.
    """
    import typer

    if typer.core.HAS_RICH:
        from rich.markup import escape

        for each in (command, *command.params):
            if written := getattr(each, "help", None):
                paragraphs = (" ".join(paragraph.split()) for paragraph in inspect.cleandoc(written).split("\n\n"))
                each.help = escape("\n\n".join(paragraphs))
        for each in getattr(command, "commands", {}).values():
            _as_written(each)
    return command


def _package(entry: EntryPoint) -> str:
    """Top-level package an entry point lives in."""
    return entry.module.partition(".")[0]


def _raised_in(error: BaseException) -> str:
    """Name of the top-level package whose code raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _tell(who: str, message: str, status: int) -> int:
    """Say one line on standard error, whatever line breaks the message had."""
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main()
    exec("")  # `python -m` ends by SIGINT when Ctrl-C met any exec of text, caught or not; the next exec forgets it
    sys.exit(status)
