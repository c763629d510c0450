"""A task turns a batch into losses; the loop knows nothing else about what it trains.

A task owns its recipe's part of the configuration, the data set it reads, the network it trains, the frozen networks
it needs, a sheet that shows progress to a person, and how the result is saved in the ecosystem's own format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from training.checkpoints import load_weights
from training.data.examples import Skipped

Network = TypeVar("Network", bound=nn.Module)

TOGETHER = 64  # held-back examples whose error is measured at once


class Task(nn.Module, ABC, Generic[Network]):
    """One trainable part. `forward(batch, rng)` gives its losses, so data-parallel wrappers see one module.

    `network` is what is trained, averaged and saved. Frozen networks may be submodules too; only parameters that ask
    for gradients are optimised, and only those of `network` are checkpointed.
    """

    network: Network
    dataset: Dataset[Any]
    skipped: Skipped  # what was left out of the data, told when training ends
    reads: str  # a digest of all it reads: pictures, captions, frozen networks
    num_validation: int = 0  # how many of the last examples are kept for `measure`
    progress: float = 0.0  # share of the steps done, in [0, 1); the loop says it before every step

    @abstractmethod
    def forward(self, batch: Any, rng: torch.Generator) -> dict[str, Tensor]:
        """Scalar losses by name; `loss` is minimised, the others are logged. All noise comes from `rng`."""

    def groups(self) -> list[list[int]]:
        """Indices of examples that must share a batch, without those for validation; by default each stands alone."""
        return [[index] for index in range(self.validation_indices.start)]

    @property
    def validation_indices(self) -> range:
        """The examples that are kept for `measure`."""
        number = len(self.dataset)  # type: ignore[arg-type]
        return range(number - self.num_validation, number)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def batch_of(self, indices: range) -> Any:
        """These examples as `forward` takes them, where the network is."""
        return moved(default_collate([self.dataset[index] for index in indices]), self.device)

    @torch.no_grad()
    def validation_loss(self, network: Network, name: str) -> float:
        """The mean of one of the losses over all examples for validation; its noise is the same every time."""
        losses = []
        with self.asking(network):
            for first in self.validation_indices[::TOGETHER]:
                batch = self.batch_of(range(first, min(first + TOGETHER, self.validation_indices.stop)))
                losses.append(self(batch, torch.Generator(self.device).manual_seed(first))[name])
        return torch.stack(losses).mean().item()

    @contextmanager
    def asking(self, network: Network) -> Iterator[None]:
        """Within it `forward` asks this network for the trained one."""
        trained, self.network = self.network, network
        try:
            yield
        finally:
            self.network = trained

    def start_from(self, folder: Path) -> None:
        """Start the network from the trained one in `folder`; CheckpointError when it does not fit."""
        load_weights(self.network, folder)

    @abstractmethod
    def sheet(self, network: Network) -> Image.Image:
        """A picture of what `network` (the trained one or its average) does now."""

    @abstractmethod
    def measure(self, network: Network) -> dict[str, float]:
        """Scores on examples kept out of training, by name."""

    @abstractmethod
    def save(self, network: Network, folder: Path) -> None:
        """Write `network` into the empty `folder` in its ecosystem's format."""


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device; what lies in pinned memory may still be on its way."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def validation_size(num_examples: int, share: float = 0.02, most: int = 512) -> int:
    """How many of a data set's last examples a task keeps for `measure`: 2 %, at most 512, at least 1."""
    return max(1, min(most, int(num_examples * share)))
