"""What every contestant is to paint: the workloads, and one of them with nothing left to look up."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contest.models import MEDIUM, SMALL, STABLE_DIFFUSION, TINY, Shape, write_random
from gen.card import Card
from gen.model_folder import find
from options import PROMPT

SEED = 0  # of the first candidate; the k-th has k more


@dataclass(frozen=True)
class Workload:
    """What every contestant is to paint."""

    model: str | Shape  # a bundled name, or one to be made
    number: int  # N
    keep: int  # k
    steps: int | None = None  # None: as the model's card says, as below
    guidance_scale: float | None = None


WORKLOADS = {
    "shapes64": Workload("shapes64", number=16, keep=4),
    "unet-36m": Workload(SMALL, number=8, keep=4, steps=20, guidance_scale=5.0),
    "unet-139m": Workload(MEDIUM, number=8, keep=4, steps=20, guidance_scale=5.0),
    "sd15": Workload(STABLE_DIFFUSION, number=16, keep=4, steps=30, guidance_scale=7.5),
    "sd15-one": Workload(STABLE_DIFFUSION, number=1, keep=1, steps=30, guidance_scale=7.5),
    "shapes64-tiny": Workload("shapes64", number=3, keep=2, steps=2),
    "tiny": Workload(TINY, number=4, keep=2, steps=4, guidance_scale=3.0),
}
# What is measured where nothing is named, by sizes and kind of device.
USUAL = {
    "real": {"cpu": ["shapes64", "unet-36m"], "cuda": ["shapes64", "sd15", "sd15-one"]},
    "tiny": {"cpu": ["shapes64-tiny", "tiny"], "cuda": ["shapes64-tiny", "tiny"]},
}


@dataclass(frozen=True)
class Task:
    """A workload as a contestant is given it, with nothing left to look up."""

    model: str  # a bundled name or a folder
    number: int
    keep: int
    steps: int
    guidance_scale: float
    device: str

    @property
    def seeds(self) -> list[int]:
        """Of the candidates, in drawing order."""
        return list(range(SEED, SEED + self.number))

    def best(self, scores: Tensor) -> list[int]:
        """The candidates kept, best first; of equals the earlier one."""
        order: list[int] = torch.sort(scores.float(), descending=True, stable=True).indices.tolist()
        return order[: self.keep]


def task_of(workload: Workload, folder: Path, device: str) -> tuple[Task, dict[str, Any]]:
    """A workload as contestants are given it, its model written to a folder where it is random; and what it is."""
    described: dict[str, Any] = asdict(workload)
    if isinstance(workload.model, Shape):
        model = str(folder)
        described["unet_parameters"] = write_random(workload.model, PROMPT, folder)
    else:
        model = workload.model
    defaults = Card.read(find(model)).defaults
    steps = defaults["num_inference_steps"] if workload.steps is None else workload.steps
    scale = defaults["guidance_scale"] if workload.guidance_scale is None else workload.guidance_scale
    task = Task(model, workload.number, min(workload.keep, workload.number), steps, scale, device)
    return task, described | {"keep": task.keep, "steps": steps, "guidance_scale": scale}
