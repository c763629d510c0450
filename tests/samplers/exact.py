"""Distributions whose best denoiser, or whose whole path, is known in closed form."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samplers.noise import NoiseStream
from samplers.sample import advance, needs_noise, start
from samplers.schedule import Schedule
from samplers.state import Denoise, Level, Prediction, State, per_row

MEAN, DEVIATION = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor) -> Prediction:
    """E[x0 | x] where every number of x0 is N(MEAN, DEVIATION^2)."""
    s = per_row(sigma, x)
    return Prediction((DEVIATION**2 * x + s**2 * MEAN) / (DEVIATION**2 + s**2))


def gaussian_path(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Where the probability-flow ODE of that Gaussian carries x from sigma to sigma_next."""
    growth = ((DEVIATION**2 + sigma_next**2) / (DEVIATION**2 + sigma**2)).sqrt()
    return MEAN + (x - MEAN) * per_row(growth, x)


def pictures(count: int, shape: tuple[int, ...]) -> Tensor:
    """A small data set: `count` different pictures."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(99))


def mixture(data: Tensor, width: float = 0.0) -> Denoise:
    """E[x0 | x] where x0 is one of the data, blurred by deviation `width`; 0: the ideal denoiser."""

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        s = sigma.double().reshape(-1, 1)
        variance = s**2 + width**2
        distance = (x.double().flatten(1)[:, None] - data.double().flatten(1)).square().sum(-1)  # (B, count)
        centre = torch.softmax(-distance / (2 * variance), 1) @ data.double().flatten(1)
        x0 = (width**2 * x.double().flatten(1) + s**2 * centre) / variance
        return Prediction(x0.reshape(x.shape).to(x.dtype))

    return denoise


def levels(schedule: Schedule, steps: list[int]) -> Level:
    return schedule.level(torch.tensor(steps))


def double(level: Level, schedule: Schedule) -> Level:
    """The same level in float64, for orders of convergence."""
    return replace(level, sigma=schedule.sigmas[level.index])


def run(
    sampler: str,
    denoise: Denoise,
    schedule: Schedule,
    seeds: list[int],
    shape: tuple[int, ...],
    options: dict[str, Tensor] | None = None,
    watch: Callable[[int, State], None] = lambda index, state: None,
) -> Tensor:
    """All the seeds from start to end in one batch; the pictures."""
    stream = NoiseStream(seeds, "decoder", shape)
    state = start(sampler, stream.at(0), torch.full((len(seeds),), schedule.start_scale))
    for index in range(schedule.num_steps):
        now, next = (levels(schedule, [step] * len(seeds)) for step in (index, index + 1))
        noise = stream.at(index + 1) if needs_noise(sampler, options) else None
        state = advance(sampler, denoise, state, now, next, noise, options)
        watch(index + 1, state)
    return state.x * schedule.end_scale
