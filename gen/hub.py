"""What is fetched of a hub repository: the parts that its index lists, each in one variant, or an adapter's file.

As safetensors, never pickle, never code, no part that nothing here asks. Knows the hub and how a repository is laid
out, and not what the files mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download

from clip_core.hub import fetch
from clip_core.weights import CONFIG_SUFFIXES
from gen.weights import of_one_variant


def download(repo: str, index: str, beside: Sequence[str], parts_of: Callable[[Path], Sequence[str]]) -> Path:
    """The local copy of a model's repository: fetches what the cache lacks; without network, uses what the cache has.

    `index` is the file that lists the parts, `beside` what else is taken from the top. Raises one of `HUB_ERRORS`.
    """
    parts = parts_of(Path(hf_hub_download(repo, index)))
    return fetch(repo, lambda names: [index, *beside, *needed(names, parts)])


def needed(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Of a repository's files those that these parts are loaded from."""
    by_part: dict[str, list[str]] = {part: [] for part in parts}
    for name in names:
        part, _, file = name.rpartition("/")
        if part in by_part:
            by_part[part].append(file)
    return [f"{part}/{file}" for part, files in by_part.items() for file in _of_part(files)]


def _of_part(files: Sequence[str]) -> list[str]:
    weights, _ = of_one_variant(file for file in files if file.endswith(".safetensors"))
    return [*(file for file in files if file.endswith(CONFIG_SUFFIXES)), *weights]
