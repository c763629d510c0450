"""What is fetched of a hub repository: the parts that its index lists, each in one variant, or an adapter's file.

As safetensors, never pickle, never code, no part that nothing here asks. Knows the hub and how a repository is laid
out, and not what the files mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from clip_core.weights import SAID
from gen.weights import of_one_variant

HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def download(repo: str, index: str, beside: Sequence[str], parts_of: Callable[[Path], Sequence[str]]) -> Path:
    """The local copy of a model's repository: fetches what the cache lacks; without network, uses what the cache has.

    `index` is the file that lists the parts, `beside` what else is taken from the top. Raises one of `HUB_ERRORS`.
    """
    parts = parts_of(Path(hf_hub_download(repo, index)))
    return fetch(repo, lambda names: [index, *beside, *needed(names, parts)])


def fetch(repo: str, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """The local copy of a repository with what `wanted` chooses of its files; without network, what the cache has.

    It chooses by names, and may give patterns with `*`. Raises one of `HUB_ERRORS`.
    """
    try:
        names = list_repo_files(repo)
    except HfHubHTTPError:  # the hub has answered, and there is nothing to be had
        raise
    except Exception:  # it cannot be reached, whatever the client's own library calls that, or must not be
        # no patterns: the copy may lack what was never asked for, which the client would refuse
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
    return Path(snapshot_download(repo, allow_patterns=list(wanted(names))))


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
    return [*(file for file in files if file.endswith(SAID)), *weights]
