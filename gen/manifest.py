"""A manifest: a file of prompts, one request a line.

Owns: its two formats, which words a line may say, and where the files that it names lie. What a word may be is
`gen.resolve`'s to refuse. An entry holds nothing but JSON, so that what was asked can be written down and compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gen.candidate import PICTURES, SHOWN, TENSORS
from gen.checks import as_number
from gen.request import Request
from gen.settings import JSON

FORMATS = (".jsonl", ".txt")
EXAMPLE = '{"prompt": "a red star"}'
ID = "id"  # what people know a line by; it is handed on and means nothing here
APART = {  # words of a request that no line can say
    "budget": "all requests share the machine",
    "output_type": "pictures are written as PNG",
    "denoising_start": "latents are no file",
    "denoising_end": "latents are no file",
    **dict.fromkeys((*TENSORS, SHOWN), "tensors are no JSON"),
}
WORDS = tuple(item.name for item in fields(Request) if item.name not in APART)
PAIRS = tuple(item.name for item in fields(Request) if str(item.type).startswith("tuple"))


@dataclass(frozen=True)
class Entry:
    """A line that asks for pictures."""

    number: int  # of the line, from 1
    words: Mapping[str, JSON]  # of its request; files by their whole path
    id: JSON = None  # as the line has it; None: it has none

    def request(self) -> Request:
        """What the line asks for, unchecked."""
        pairs = {name: tuple(value) for name in PAIRS if isinstance(value := self.words.get(name), list)}
        return Request(**{**self.words, **pairs})  # type: ignore[arg-type]


def read_manifest(path: Path) -> list[Entry]:
    """The lines of a manifest: `.jsonl` has an object of a request's words a line, `.txt` a prompt a line.

    A word that is null is as if it were left out. Pictures that a line names lie beside the manifest, or where their
    whole path says. Empty lines are passed over. ValueError, with the line's number, for one that says no request.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"manifest '{path}' is of no known format; give a file that ends in {' or '.join(FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte-order mark
    except OSError as error:
        raise ValueError(f"manifest '{path}' cannot be read ({error.strerror}); give a file of prompts") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"manifest '{path}' is not text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"manifest '{path}' is empty; write one prompt a line")
    if path.suffix.lower() == ".txt":
        return [Entry(number, {"prompt": line.strip()}) for number, line in lines]
    entries = []
    for number, line in lines:
        try:
            entries.append(_entry(number, line, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return entries


def checked(words: Mapping[str, Any], folder: Path) -> dict[str, JSON]:
    """A request's words as JSON, without those that are None; files, which lie in the folder, by their whole path.

    ValueError for a word that no line can say, or that would stand for several requests.
    """
    found: dict[str, JSON] = {}
    for name, value in words.items():
        _check_name(name)
        if value is None:
            continue
        if name == "prompt" and not isinstance(value, str):
            raise ValueError(f"prompt={value!r} is no text; write one prompt a line")
        if name in PICTURES:
            if not isinstance(value, str | Path):
                raise ValueError(f"{name}={value!r} is no path; name one picture file")
            value = os.path.abspath(folder / value)
        found[name] = _json(name, list(value) if isinstance(value, tuple) else as_number(value))
    return found


def _entry(number: int, line: str, folder: Path) -> Entry:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise ValueError(f"no JSON ({error}); write one object a line, such as {EXAMPLE}") from None
    if not isinstance(content, dict):
        raise ValueError(f"no object; write one a line, such as {EXAMPLE}")
    entry_id = _json(ID, content.pop(ID, None))
    return Entry(number, checked(content, folder), entry_id)


def _json(name: str, value: Any) -> JSON:
    """A value that can be written as JSON, in UTF-8; ValueError for any other."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # half of a character, and what is no number, can be read
        raise ValueError(f"{name}={value!r} cannot be written as JSON ({error}); give another") from None
    found: JSON = value
    return found


def _check_name(name: str) -> None:
    if name in APART:
        raise ValueError(f"'{name}' is no word of a line, for {APART[name]}; leave it out")
    if name not in WORDS:
        near = [*(word for word in WORDS if name in word), *get_close_matches(name, WORDS, 1, cutoff=0.75)]
        hint = f"did you mean '{near[0]}'?" if near else "leave it out"
        raise ValueError(f"'{name}' is no word of a request; {hint}")
