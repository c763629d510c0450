"""What is fetched of a hub repository: the parts that its index lists, each in one variant, as safetensors.

Never pickle, never code, no single file, no part that nothing here asks. Knows the hub and how a repository is laid
out, and not what the files mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gen.weights import of_one_variant

HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
SAID = (".json", ".txt", ".model")  # of what is beside weights: configurations, vocabularies


def download(repo: str, index: str, beside: Sequence[str], parts_of: Callable[[Path], Sequence[str]]) -> Path:
    """The local copy of a repository, fetched as far as it is not there yet; without network, what the cache has.

    `index` is the file that lists the parts, `beside` what else is taken from the top. Raises one of `HUB_ERRORS`.
    """
    parts = parts_of(Path(hf_hub_download(repo, index)))
    try:
        names = list_repo_files(repo)
    except HfHubHTTPError:  # the hub has answered, and there is nothing to be had
        raise
    except Exception:  # it cannot be reached, whatever the client's own library calls that, or must not be
        return Path(snapshot_download(repo, local_files_only=True))
    return Path(snapshot_download(repo, allow_patterns=[index, *beside, *needed(names, parts)]))


def needed(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Of a repository's files those that these parts are loaded from."""
    by_part: dict[str, list[str]] = {part: [] for part in parts}
    for name in names:
        part, _, file = name.partition("/")
        if part in by_part and "/" not in file:
            by_part[part].append(file)
    return [f"{part}/{file}" for part, files in by_part.items() for file in _of_part(files)]


def _of_part(files: Sequence[str]) -> list[str]:
    weights, _ = of_one_variant(file for file in files if file.endswith(".safetensors"))
    return [*(file for file in files if file.endswith(SAID)), *weights]
