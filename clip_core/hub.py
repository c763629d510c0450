"""The local copy of a hub repository, as far as it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def fetch(repo: str, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """The local copy of a repository with what `wanted` chooses of its files; without the hub, what the cache has.

    It chooses by names, and may give patterns with `*`. Raises one of `HUB_ERRORS`.
    """
    try:
        names = list_repo_files(repo)
    except Exception as error:  # it cannot be reached, whatever the client's own library calls that, or says no
        try:  # no patterns: the copy may lack what was never asked for, which the client would refuse
            return Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            if isinstance(error, HfHubHTTPError):  # what the hub has answered says more
                raise error from None
            raise
    return Path(snapshot_download(repo, allow_patterns=list(wanted(names))))
