"""The smallest task there is, for tests of the loop: a line through points, with noise and dropout on demand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from training.data.examples import Skipped
from training.recipe import Recipe, check
from training.task import Task

NUM_POINTS = 64


class Net(nn.Sequential):
    def __init__(self, dropout: float) -> None:
        super().__init__(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.register_buffer("offset", torch.tensor(0.5))


Before = Callable[["Line"], None]


class Line(Task[Net]):
    """Mean squared error; `before(self)` is called at the start of every forward pass."""

    def __init__(self, *, dropout: float = 0.0, noise: float = 0.0, before: Before = lambda task: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(NUM_POINTS, 4, generator=rng)
        y = (x @ torch.tensor([1.0, -2.0, 0.5, 3.0]))[:, None] + 1
        self.dataset: Dataset[Any] = TensorDataset(torch.arange(NUM_POINTS), x, y)
        self.network = Net(dropout)
        self.skipped, self.reads = Skipped(), "a line"
        self.noise, self.before = noise, before
        self.seen: list[list[int]] = []  # indices of every batch
        self.weights: list[dict[str, Tensor]] = []  # before every forward pass
        self.looked: list[bool] = []  # whether the network was in training mode when it was looked at
        self.saves = 0

    def forward(self, batch: list[Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        self.before(self)
        index, x, y = batch
        self.seen.append(index.tolist())
        self.weights.append({name: value.detach().clone() for name, value in self.network.state_dict().items()})
        x = x + self.noise * torch.randn(x.shape, generator=rng, device=x.device)
        return {"loss": (self.network(x) + self.network.offset - y).square().mean()}

    def sheet(self, network: Net) -> Image.Image:
        self.looked.append(network.training)
        torch.rand(7)  # whoever paints may draw as much as they like
        return Image.new("RGB", (4, 4))

    def measure(self, network: Net) -> dict[str, float]:
        self.looked.append(network.training)
        torch.rand(7)
        return {"score": 1.0}

    def save(self, network: Net, folder: Path) -> None:
        self.saves += 1
        self.looked.append(network.training)
        save_file({name: value.clone() for name, value in network.state_dict().items()}, folder / "model.safetensors")


def recipe(out: Path, **train: Any) -> Recipe:
    """Twelve steps in epochs of eight, saved every five."""
    fields = {
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "ema_decay": 0.9,
        "log_every": 1,
        "save_every": 5,
        "sheet_every": 4,
    }
    return check(Recipe, {"task": "line", "data": "none", "out": str(out), "train": {**fields, **train}})


def at_forward(number: int, act: Callable[[], None]) -> Before:
    """Do `act` in the middle of the step that makes forward pass `number`, counted from 1."""

    def before(task: Line) -> None:
        if len(task.seen) + 1 == number:
            act()

    return before


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
