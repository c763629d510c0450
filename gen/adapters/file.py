"""The file of an adapter: found by path or on the hub, read whole, told apart by its content.

Safetensors only, never pickle; only a hub id touches the network. It knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clip_core.hub import HUB_ERRORS, fetch
from clip_core.weights import opened
from clip_core.wording import one_line
from gen.checks import check_name, is_number
from gen.settings import JSON

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Adapter:
    """What was added to a model, as a record names it: enough to add it again and to know it for the same."""

    kind: str  # "lora", "embedding" or "ip_adapter"
    name: str  # the path or hub id it was loaded by
    hash: str  # SHA-256 of its file, and of what else it depends on
    scale: float | None = None  # None: its kind has none
    token: str | None = None  # the word it is; None: its kind has none
    image_encoder: str | None = None  # what was named as its image encoder; None: nothing was, or no picture needs it

    def to_json(self) -> dict[str, JSON]:
        """As it stands in a record."""
        record: dict[str, JSON] = {"kind": self.kind, "name": self.name, "hash": self.hash}
        record |= {} if self.scale is None else {"scale": self.scale}
        record |= {} if self.token is None else {"token": self.token}
        return record | ({} if self.image_encoder is None else {"image_encoder": self.image_encoder})

    @classmethod
    def from_json(cls, record: object) -> Adapter:
        """As a record has it; ValueError where it is damaged."""
        if isinstance(record, Mapping):
            kind, name, digest, scale, token, encoder = (record.get(item.name) for item in fields(cls))
            good = (scale is None or is_number(scale, -math.inf)) and isinstance(token, str | None)
            good = good and isinstance(encoder, str | None)
            if isinstance(kind, str) and isinstance(name, str) and isinstance(digest, str) and good:
                return cls(kind, name, digest, scale, token, encoder)
        raise ValueError(f"the record is damaged: its adapters have {record!r}")

    def __str__(self) -> str:
        scaled = "" if self.scale is None else f" x {self.scale:g}"
        called = "" if self.token is None else f" as {self.token}"
        return f"{self.kind} '{self.name}'{scaled}{called} ({self.hash[:12]})"

    def is_same(self, other: Adapter) -> bool:
        """Whether both add the same, wherever their files lie."""
        return replace(self, name="", image_encoder=None) == replace(other, name="", image_encoder=None)


class AdapterWeights(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Found:
    """Where an adapter's file is."""

    path: Path
    repository: str = ""  # of the hub, of which it was fetched; empty: it was here
    copy: Path = Path()  # that repository's folder here, where there is one


def found(kind: str, name: str | Path, usual: str, beside: Sequence[str] = ()) -> Found:
    """The file of a path, a folder or a hub id (owner/name or owner/name/FILE.safetensors).

    Of a folder or repository it is the file called `usual`, or the only one at the top. `beside` are patterns of what
    else is fetched of a repository. Where the hub cannot be reached, what the cache has will do. ValueError where there
    is no such file.
    """
    check_name(kind, name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != SUFFIX:
            raise ValueError(f"{kind} '{name}' is no {SUFFIX} file; others may hold pickle, which is never read")
        return Found(path)
    if path.is_dir():
        return Found(path / chosen(kind, str(name), tops(path), usual))
    owner, _, rest = str(name).partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository or str(name).startswith((".", "~", "/")) or Path(owner).is_dir():
        raise ValueError(f"{kind} '{name}' is no file; give a {SUFFIX} file, a folder with one, or a hub id")
    if file and not file.endswith(SUFFIX):
        raise ValueError(f"{kind} '{name}' is no {SUFFIX} file; others may hold pickle, which is never read")

    def wanted(names: Sequence[str]) -> list[str]:
        at_top = [each for each in names if "/" not in each]
        return [file or chosen(kind, str(name), at_top, usual), *beside]

    repository = f"{owner}/{repository}"
    copy = fetched(kind, name, repository, wanted)
    path = copy / (file or chosen(kind, str(name), tops(copy), usual))
    if not path.is_file():
        raise ValueError(f"{kind} '{name}' is no file of that repository, as far as it can be reached")
    return Found(path, repository, copy)


def fetched(kind: str, name: str | Path, repository: str, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """The local copy of an adapter's repository; see `clip_core.hub.fetch`. ValueError where there is none."""
    try:
        return fetch(repository, wanted)
    except HUB_ERRORS as error:
        message = f"{kind} '{name}' is no file here and cannot be fetched from the hub ({one_line(error)})"
        raise ValueError(message) from error


def tops(folder: Path) -> list[str]:
    """The files of a folder that may hold weights."""
    return sorted(path.name for path in folder.glob(f"*{SUFFIX}"))


def chosen(kind: str, name: str, files: list[str], usual: str) -> str:
    """Which of the files is meant."""
    offered = [file for file in files if file.endswith(SUFFIX)]
    if usual in offered:
        return usual
    if len(offered) != 1:
        problem = f"has {', '.join(offered)}; name one of them" if offered else f"has no {SUFFIX} file"
        raise ValueError(f"{kind} '{name}' {problem}")
    return offered[0]


def read(path: Path) -> AdapterWeights:
    """All tensors of a file and what it says of itself; ValueError for a damaged one, and for numbers that are none."""
    with opened(path, "file") as file:
        weights = AdapterWeights({key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    for key, tensor in weights.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"file '{path}' is damaged: its {key} has numbers that are not finite")
    return weights
