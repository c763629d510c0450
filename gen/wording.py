"""How Python's words are said on the command line, and what a verb says while it works.

Errors and warnings speak Python's words; here they become the options that were typed, one line each.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from gen.options import OPTIONS, flags, typed

SPELLED = {word: typed(word) for word in OPTIONS}
FLAGS = {f"{word}={value}": flag for word in OPTIONS for value, flag in flags(word).items()}
# Names that are English words too: they are options where a sentence speaks of what was given. "A smaller model" is
# said of what a model is made of.
BARE = {word: option for word, option in SPELLED.items() if "_" not in word and word != "model"}
SPOKEN = (
    r"^{name}(?= (?:was|is|has|holds|and) )",
    r"(?<=\bwithout ){name}(?=;)",
    r"(?<=\bleave ){name}(?= out)",
    r"(?<=\bgive ){name}(?= and |$)",
    r"(?<=\bsmaller ){name}$",
    r"(?<=\bwith ){name}$",
    r"(?<=\bone of ){name}(?= and )",
    r"(?<= and ){name}(?= (?:were both|was) given| to have )",
)
# What a user gave, in an error's words; not the ' of a genitive.
QUOTED = re.compile(r"(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w)")


@contextmanager
def speaking(verb: str) -> Iterator[None]:
    """While a verb works: errors in the command line's words, warnings in one line, standard output clean."""

    def warn(message: Warning | str, category: type[Warning], *where: object) -> None:
        if issubclass(category, UserWarning) and (line := in_options(str(message))) not in printed:
            printed.add(line)
            say(verb, line)

    printed: set[str] = set()
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # a library's deprecations are no news to who paints
        warnings.filterwarnings("always", message=r".* is ignored: ", category=UserWarning)
        warnings.showwarning = warn  # type: ignore[assignment]
        try:
            yield
        except ValueError as error:
            error.args = (in_options(str(error)),)
            raise


def say(verb: str, message: str) -> None:
    """One line on standard error."""
    print(f"unclip {verb}: {message}", file=sys.stderr)


def in_options(message: str) -> str:
    """A message in the command line's words: `--steps` where Python says `num_inference_steps`."""
    quoted = QUOTED.findall(message)
    message = QUOTED.sub("\0", message)
    for word, flag in FLAGS.items():
        message = message.replace(word, flag)
    for name, option in SPELLED.items():
        message = re.sub(rf"\b{name}=", f"{option} ", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w/\\.-]){name}(?![\w/\\-]|\.\w)", option, message)  # and not in a path
    for name, option in BARE.items():
        message = re.sub("|".join(SPOKEN).format(name=name), option, message)
    parts = message.split("\0")
    return "".join(part + quoted_part for part, quoted_part in zip(parts, [*quoted, ""], strict=True))


def check_text(*texts: str) -> None:
    """ValueError for bytes of the command line that are no text; Python holds them as lone surrogates."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text!r} is not text in UTF-8; set the terminal to UTF-8") from None
