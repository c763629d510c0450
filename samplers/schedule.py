"""Noise levels: those a network was trained on, and those a run steps through.

Betas and flow times are converted to sigma here, once, in float64; levels are always finite. Rows only ever
see `Level`s. The rules are those of diffusers' schedulers, so a stock checkpoint steps where it always did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from samplers.state import Level

Betas = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "linspace", "trailing"]
Final = Literal["zero", "sigma_min"]

ZERO_SNR_SIGMA = 4096.0  # diffusers gives a level without signal alpha_bar = 2**-24
EXACT_ZERO_SNR_SIGMA = 1e6  # DDIM's stock form computes with alpha_bar = 0; 1 / 1e6 is lost in float32
FLOW_SIGMA_MAX = 1e6  # of flow time 1


# --- What the network was trained on ---


def make_betas(
    kind: Betas = "scaled_linear",
    num_train_timesteps: int = 1000,
    start: float = 0.00085,  # Stable Diffusion's, as is the end; unused by cosine
    end: float = 0.012,
) -> Tensor:
    """Variances added per training timestep, (T,), float32 as in diffusers, so that levels are equal."""
    if kind == "linear":  # Ho et al. 2020
        return torch.linspace(start, end, num_train_timesteps, dtype=torch.float32)
    if kind == "scaled_linear":  # Rombach et al. 2022
        return torch.linspace(start**0.5, end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    if kind == "cosine":  # Nichol & Dhariwal 2021, equation 17
        t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alpha_bar = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()
    raise ValueError(f"beta schedule {kind!r} is unknown; choose from: {', '.join(get_args(Betas))}")


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch so that the last timestep is pure noise: Lin et al. 2024, Algorithm 1."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def training_sigmas(betas: Tensor, max_sigma: float = ZERO_SNR_SIGMA) -> Tensor:
    """Sigma of every training timestep, (T,) float64; max_sigma is that of a timestep without signal."""
    alpha_bar = (1 - betas).cumprod(0).double()  # in the betas' own precision, as the network was trained
    return torch.where(alpha_bar > 0, ((1 - alpha_bar) / alpha_bar).sqrt(), max_sigma)


def flow_sigma(time: Tensor) -> Tensor:
    """Sigma of flow time t in [0, 1]: (1 - t) x0 + t eps is (1 - t) (x0 + sigma eps), sigma = t / (1 - t)."""
    return (time / (1 - time)).clamp(max=FLOW_SIGMA_MAX)


# --- What a run steps through ---


@dataclass(frozen=True)
class Schedule:
    """The levels of a run, how its noise starts and how its last x is read."""

    sigmas: Tensor  # (N + 1,) float64, descending; the last is 0 or the smallest level
    start_scale: float  # x at the first level is this times unit noise
    end_scale: float = 1.0  # the picture is this times x at the level that the run ends at
    first: int = 0  # the level that a run begins at; above 0, with a picture that is noised to it
    stop: int | None = None  # the level that it ends at, where another run goes on; None: the last
    resumed_scale: float = 1.0  # x at the first level is this times what another run ended with

    @property
    def last(self) -> int:
        """The index of the last level."""
        return len(self.sigmas) - 1

    @property
    def end(self) -> int:
        """The index of the level that a run ends at."""
        return self.last if self.stop is None else self.stop

    @property
    def num_steps(self) -> int:
        """Steps of a run, from its first level to its end."""
        return self.end - self.first

    def level(self, index: Tensor, device: torch.device | str = "cpu") -> Level:
        """The levels of rows at index (B,), 0 .. N."""
        index = index.to("cpu", torch.int64)
        sigma = self.sigmas[index].float()
        return Level(sigma.to(device), index.to(device), (self.last - index).to(device))


def spaced_timesteps(
    num_steps: int,
    num_train_timesteps: int = 1000,
    *,
    spacing: Spacing = "trailing",
    steps_offset: int = 0,  # leading only: 1 for Stable Diffusion
    whole: bool = True,  # False leaves linspace between the integers, as in diffusers' Euler and Heun
    beyond_last: bool = False,  # True spaces N + 1 points and drops the last, as in diffusers' DPM-Solver
) -> Tensor:
    """Training timesteps to visit, (N,) float64, descending: Lin et al. 2024, Table 2.

    Raises ValueError for an unknown spacing and for steps that do not all have a timestep of their own.
    """
    most = num_train_timesteps
    if spacing != "trailing":
        most -= beyond_last
    if spacing == "leading":
        most -= steps_offset
    if not 1 <= num_steps <= most:
        raise ValueError(f"{num_steps} steps cannot be taken by {spacing} timesteps; give 1 to {most}")
    points = num_steps + beyond_last
    if spacing == "linspace":
        # multiplied as numpy does: torch.linspace counts from both ends and rounds ties to other integers
        stride = (num_train_timesteps - 1) / max(points - 1, 1)
        steps = torch.arange(points, dtype=torch.float64).flip(0)[:num_steps] * stride
        return steps.round() if whole else steps
    if spacing == "leading":
        stride = num_train_timesteps // points
        return torch.arange(points, dtype=torch.float64).flip(0)[:num_steps] * stride + steps_offset
    if spacing == "trailing":
        # the stride as numpy.arange rounds it, or ties (48 steps of 1000) go to other integers
        stride = num_train_timesteps - (num_train_timesteps - num_train_timesteps / num_steps)
        taken = torch.arange(num_steps, dtype=torch.float64) * stride
        return (num_train_timesteps - taken).round() - 1
    raise ValueError(f"timestep spacing {spacing!r} is unknown; choose from: {', '.join(get_args(Spacing))}")


def lcm_timesteps(num_steps: int, num_train_timesteps: int = 1000, original_steps: int = 50) -> Tensor:
    """Training timesteps to visit, (N,) float64, descending: evenly spaced among those that were distilled.

    Those are every (T // original_steps)-th from the last (Luo et al. 2023, section 4.3), as diffusers picks from
    them. Raises ValueError for steps outside 1 .. original_steps.
    """
    if not 1 <= num_steps <= original_steps:
        raise ValueError(f"{num_steps} steps cannot be taken; give 1 to {original_steps}")
    distilled = torch.arange(original_steps, 0, -1, dtype=torch.float64) * (num_train_timesteps // original_steps) - 1
    return distilled[torch.arange(num_steps) * original_steps // num_steps]


def from_timesteps(
    betas: Tensor,
    timesteps: Tensor,  # (N,) float64, descending; also between two integers
    *,
    final: Final = "zero",  # "sigma_min" ends at the first training level: set_alpha_to_one=False in DDIM
    max_sigma: float = ZERO_SNR_SIGMA,
    unit_variance: bool = True,  # latents as DDIM, DDPM and DPM-Solver hold them; False: as Euler and Heun do
    unit_start: bool | None = None,  # whether noise enters at unit variance; None: as latents are held
) -> Schedule:
    """Levels at these training timesteps; max_sigma as in `training_sigmas`."""
    table = training_sigmas(betas, max_sigma)
    below = timesteps.floor().long().clamp(0, len(table) - 2)
    sigmas = torch.lerp(table[below], table[below + 1], (timesteps - below).clamp(0, 1))
    last = table[0].item() if final == "sigma_min" else 0.0
    return _run(sigmas, last, unit_variance, unit_start)


def from_betas(
    betas: Tensor,
    num_steps: int,
    *,
    spacing: Spacing = "trailing",
    steps_offset: int = 0,
    final: Final = "zero",
    max_sigma: float = ZERO_SNR_SIGMA,
    unit_variance: bool = True,
    whole: bool = True,
    beyond_last: bool = False,
) -> Schedule:
    """Levels at spaced training timesteps; options as in `spaced_timesteps` and `from_timesteps`."""
    timesteps = spaced_timesteps(
        num_steps,
        len(betas),
        spacing=spacing,
        steps_offset=steps_offset,
        whole=whole,
        beyond_last=beyond_last,
    )
    return from_timesteps(
        betas,
        timesteps,
        final=final,
        max_sigma=max_sigma,
        unit_variance=unit_variance,
        unit_start=unit_variance or spacing == "leading",
    )


def karras(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,  # Karras et al. 2022, section 3
    *,
    last: float = 0.0,  # the level after sigma_min
    unit_variance: bool = True,
    unit_start: bool | None = None,  # as in `from_timesteps`
) -> Schedule:
    """Levels evenly spaced in sigma^(1 / rho): Karras et al. 2022, equation 5."""
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64) ** (1 / rho)
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return _run(torch.lerp(ends[0], ends[1], ramp) ** rho, last, unit_variance, unit_start)


def exponential(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    last: float = 0.0,
    unit_variance: bool = True,
    unit_start: bool | None = None,  # as in `from_timesteps`
) -> Schedule:
    """Levels evenly spaced in log sigma, the uniform log SNR steps of Lu et al. 2022a (DPM-Solver)."""
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return _run(torch.lerp(ends[0], ends[1], ramp).exp(), last, unit_variance, unit_start)


def flow(num_steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Schedule:
    """Flow times from 1 to 0, shifted towards noise: Esser et al. 2024, equation 23.

    As in diffusers' FlowMatchEulerDiscreteScheduler, the smallest time is shifted before the spacing too.
    """

    def shifted(time: Tensor) -> Tensor:
        return shift * time / (1 + (shift - 1) * time)

    smallest = shifted(torch.tensor(1 / num_train_timesteps, dtype=torch.float64)).item()
    sigmas = flow_sigma(shifted(torch.linspace(1, smallest, num_steps, dtype=torch.float64)))
    # the network's latent (1 - t) x starts as unit noise, and 1 / (1 - t) = 1 + sigma
    return Schedule(torch.cat([sigmas, sigmas.new_zeros(1)]), start_scale=1 + sigmas[0].item())


def _run(sigmas: Tensor, last: float, unit_variance: bool, unit_start: bool | None) -> Schedule:
    """A latent of unit variance is x / sqrt(1 + sigma^2), where noise enters and where pictures leave."""
    first = sigmas[0].item()
    enters_at_one = unit_variance if unit_start is None else unit_start
    return Schedule(
        torch.cat([sigmas, sigmas.new_tensor([last])]),
        start_scale=math.hypot(1, first) if enters_at_one else first,
        end_scale=1 / math.hypot(1, last) if unit_variance else 1.0,
    )
