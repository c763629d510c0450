"""What a model paints on its way from noise to a picture: points of its own guided runs, computed once and kept.

A trajectory is of a caption and a seed, by DDIM, whose steps draw no noise: its clean estimates tell where it went.
They lie as safetensors beside the run that learns from them, many in a file, and what is there is not painted again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gen.drafter import SAMPLER
from gen.flight import Step
from gen.pipeline import TextToImage
from samplers.noise import noise
from samplers.schedule import Schedule
from training.data.cache import kept

TOGETHER = 256  # trajectories that are painted in one call and lie in one file


@dataclass(frozen=True)
class TrajectoryOptions:
    """How trajectories are painted, and which of their points are kept."""

    schedule: Schedule  # of every step
    every: int  # a point is kept before so many steps, and the end
    guidance_scale: float


def trajectories(
    painter: Callable[[], TextToImage],  # asked only where something is to be painted
    captions: Sequence[str],  # one for each trajectory, whose seed is its place
    options: TrajectoryOptions,
    folder: Path,
    reads: str,  # a digest of what paints: parts, precision, runtime
) -> Tensor:
    """Points of each trajectory, (N, P, C, h, w) float32 on the CPU, from the folder or painted into it."""
    made: list[TextToImage] = []
    parts = range(0, len(captions), TOGETHER)
    points = []
    for first in track(parts, "painting trajectories", console=Console(stderr=True)):
        some = captions[first : first + TOGETHER]

        def paint(first: int = first, some: Sequence[str] = some) -> Tensor:
            if not made:
                made.append(painter())
            return painted(made[0], some, range(first, first + len(some)), options)

        hashed = [reads, str(options.schedule.sigmas.tolist()), str(options.every), str(options.guidance_scale), *some]
        key = hashlib.sha256("\0".join(hashed).encode()).hexdigest()[:16]
        points.append(kept(folder / f"{first:07d}-{key}.safetensors", paint))
    return torch.cat(points)


def painted(painter: TextToImage, captions: Sequence[str], seeds: Sequence[int], options: TrajectoryOptions) -> Tensor:
    """Points of each trajectory, (N, P, C, h, w) float32."""
    sigmas = options.schedule.sigmas.double()
    x: dict[int, Tensor] = {}
    points: dict[int, list[Tensor]] = {}

    def follow(step: Step) -> None:
        for seed, left, x0 in zip(step.seeds, step.steps_left, step.x0.double().cpu(), strict=True):
            taken = options.schedule.num_steps - 1 - left  # before this step
            if taken == 0:
                x[seed] = noise([seed], "decoder", 0, x0.shape)[0].double() * options.schedule.start_scale
                points[seed] = [x[seed]]
            share = sigmas[taken + 1] / sigmas[taken]
            x[seed] = x0 + share * (x[seed] - x0)
            if (taken + 1) % options.every == 0:
                points[seed].append(x[seed])

    painter(
        list(captions),
        num_inference_steps=options.schedule.num_steps,
        guidance_scale=options.guidance_scale,
        sampler=SAMPLER,
        seed=list(seeds),
        prior=False,
        rerank=False,
        output_type="latent",
        callback=follow,
        progress=False,
    )
    return torch.stack([torch.stack(points[seed]) for seed in seeds]).float()
