"""What frozen encoders make of a data set, computed once: latents and image embeddings.

An entry is keyed by the content of the data (pictures and captions) and by the encoder's weights, so a changed picture
or a retrained encoder never meets an old entry. Entries are safetensors files in `.cache/` inside the data folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from clip_core.weights import content_hash
from training.data.examples import DataError
from training.data.pictures import Pictures


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights and configurations in a model folder: names the encoder."""
    return content_hash(*sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]))


@torch.no_grad()
def encoded(
    dataset: Pictures,
    encoder: Path,
    encode: Callable[[Tensor], Tensor],
    *,
    what: str = "",
    batch_size: int = 128,
) -> Tensor:
    """`encode` of every picture, (N, ...) on the CPU, from the cache or computed into it.

    `encoder` is the folder that `encode` was loaded from, and `what` tells its outputs apart where it has several;
    `encode` takes uint8 pixels (B, 3, H, W). Raises DataError where the data's folder cannot be written.
    """
    key = hashlib.sha256(f"{dataset.digest} {weights_digest(encoder)}{what}".encode()).hexdigest()[:24]

    def compute() -> Tensor:
        batches = DataLoader(dataset, batch_size=batch_size)
        shown = track(batches, f"encoding with {encoder}", console=Console(stderr=True))
        return torch.cat([encode(pixels).cpu() for pixels, _ in shown])

    return kept(dataset.folder / ".cache" / f"{key}.safetensors", compute)


def kept(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """What lies in a file, or is computed into it; DataError where its folder cannot be made or written."""
    if path.exists():
        return load_file(path)["encoded"]
    try:  # before the work, so that a folder that cannot be written is told at once
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(f"{path.parent} cannot be written ({error.strerror}); choose a folder that can") from None
    rows = compute().contiguous()
    partial = path.with_suffix(f".{os.getpid()}.partial")  # many processes may compute the same at once
    save_file({"encoded": rows}, partial)
    partial.rename(path)
    return rows
