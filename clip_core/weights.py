"""Files of weights and what lies beside them: whether they are whole, and a network filled from them.

Owns what is said of a missing or damaged file and of weights that do not fit: one line that names them. Only
safetensors are read, never pickle. It knows no folder's layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clip_core.fit import check_fit, misshaped
from clip_core.wording import one_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONFIG_SUFFIXES = (".json", ".txt", ".model")  # what lies beside weights: configurations, vocabularies


@contextmanager
def opened(path: Path, what: str = "model file") -> Iterator[Any]:
    """A safetensors file; ValueError that names a missing or damaged one."""
    try:
        with safe_open(path, "pt") as weights:
            yield weights
    except FileNotFoundError:
        raise ValueError(f"{what} '{path}' is missing; the folder is not complete") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what} '{path}' is damaged ({one_line(error)}); fetch or save it again") from error


def shapes(path: Path, what: str = "model file") -> dict[str, tuple[int, ...]]:
    """What a file holds, by its header alone; ValueError that names a missing or damaged one."""
    with opened(path, what) as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def shards(index: Path, what: str = "model file") -> list[Path]:
    """The files that a shard index names, which lie beside it; ValueError that names a damaged one."""
    named = read_json(index, what).get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{what} '{index}' is damaged (it has no weight_map); fetch or save it again")
    if away := [file for file in named.values() if not isinstance(file, str) or Path(file).name != file]:
        raise ValueError(f"{what} '{index}' names {away[0]!r}, which is no file beside it")
    return [index.parent / name for name in sorted(set(named.values()))]


def read_json(path: Path, what: str = "model file") -> dict[str, Any]:
    """A JSON object from a file; ValueError that names the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{what} '{path}' is missing; the folder is not complete") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} '{path}' is damaged ({one_line(error)}); fetch or save it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} '{path}' is damaged (not a JSON object); fetch or save it again")
    return content


def fill(module: nn.Module, weights: Mapping[str, Tensor], what: str, dtype: torch.dtype) -> nn.Module:
    """Give a network on the meta device its weights; ValueError that names those missing or of another shape."""
    expected = module.state_dict()
    there = expected.keys() & weights.keys()
    apart = misshaped(module, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    check_fit(what, expected.keys() - there, apart, weights.keys() - there)
    module.load_state_dict({name: weights[name].to(dtype) for name in expected}, assign=True)
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            if buffer.is_meta:  # not stored: the one kind that text towers have counts the positions
                assert name == "position_ids", name
                setattr(each, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def content_hash(*paths: Path) -> str:
    """SHA-256 of the bytes of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
