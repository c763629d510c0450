"""The one wall between a network's parameterisation and everybody else.

A network speaks of timesteps and predicts eps, v, x0 or a flow. Samplers, guidance, pruning and losses speak
of x = x0 + sigma * eps and of estimates of x0, in float32. `Scaling` converts both ways and gives the target
of training, so what is trained is what is sampled. It knows no samplers, no levels of a run, no conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from samplers.schedule import FLOW_SIGMA_MAX, ZERO_SNR_SIGMA, flow_sigma, training_sigmas
from samplers.state import Denoise, Prediction, per_row

PredictionType = Literal["eps", "v", "x0", "flow"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
Network = Callable[[Tensor, Tensor], Tensor]
"""network(input (B, ...), timestep (B,)) -> output like the input, or twice its channels (`Scaling.learned_range`)"""


@dataclass(frozen=True)
class Scaling:
    """A network's parameterisation and the noise level of each of its training timesteps."""

    prediction_type: PredictionType  # ours; diffusers' epsilon, v_prediction and sample in `gen.scheduler`
    sigmas: Tensor  # (T,) float64, ascending: the sigma of timesteps 0, 1, ..., T - 1
    learned_range: bool = False  # whether a second half of the output's channels says the variance of a step

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            choices = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type={self.prediction_type!r} is unknown; choose from: {choices}")

    @classmethod
    def from_betas(cls, prediction_type: PredictionType, betas: Tensor, max_sigma: float = ZERO_SNR_SIGMA) -> Scaling:
        """A variance-preserving network (Ho et al. 2020); max_sigma stands in for a level without signal."""
        return cls(prediction_type, training_sigmas(betas, max_sigma))

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000) -> Scaling:
        """A rectified flow (Liu et al. 2023): the network sees (1 - t) x0 + t eps at timestep t * T."""
        times = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        return cls("flow", flow_sigma(times))

    def to(self, device: torch.device | str) -> Scaling:
        """The same with its table on the device, which saves a copy at every call."""
        return replace(self, sigmas=self.sigmas.to(device))

    def preconditioning(self, sigma: Tensor) -> Preconditioning:
        """How the network is asked at levels of any shape."""
        return Preconditioning(torch.stack([self.timestep(sigma.flatten()).view_as(sigma), *self._coefficients(sigma)]))

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network calls sigma (B,): float32, continuous, exactly the integer at a training level."""
        sigma = sigma.double()
        if self.prediction_type == "flow":
            time = torch.where(sigma < FLOW_SIGMA_MAX, sigma / (1 + sigma), 1.0)
            # float32 levels know their time to 1e-8: round to it, so that a training level meets its integer
            return (time.round(decimals=7) * (len(self.sigmas) - 1)).float()
        log_sigmas = self._log_sigmas.to(sigma.device)
        log_sigma = sigma.clamp(min=1e-10).log()
        below = (torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, len(log_sigmas) - 2)
        low, high = log_sigmas.index_select(0, below), log_sigmas.index_select(0, below + 1)
        return (below + ((log_sigma - low) / (high - low)).clamp(0, 1)).float()

    def sigma(self, timestep: Tensor) -> Tensor:
        """The level of timestep (B,), also between two integers: the inverse of `timestep`, float32."""
        timestep = timestep.double()
        if self.prediction_type == "flow":
            return flow_sigma(timestep / (len(self.sigmas) - 1)).float()
        log_sigmas = self._log_sigmas.to(timestep.device)
        timestep = timestep.clamp(0, len(log_sigmas) - 1)
        below = timestep.floor().long().clamp(max=len(log_sigmas) - 2)
        return torch.lerp(log_sigmas[below], log_sigmas[below + 1], timestep - below).exp().float()

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the network was trained to see: x at unit variance, or the flow's blend."""
        c_in, _, _ = self._coefficients(sigma)
        return per_row(c_in, x) * x

    def x0(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x0 that a network's output stands for."""
        _, c_skip, c_out = self._coefficients(sigma)
        return per_row(c_skip, x) * x + per_row(c_out, x) * output

    def output(self, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's output that would stand for x0: the inverse of `x0`, for sigma > 0."""
        _, c_skip, c_out = self._coefficients(sigma)
        return (x0 - per_row(c_skip, x) * x) / per_row(c_out, x)

    def target(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """What training asks of the network's output at x0 + sigma * eps."""
        if self.prediction_type == "eps":
            return eps
        if self.prediction_type == "x0":
            return x0
        if self.prediction_type == "flow":
            return eps - x0
        s = per_row(sigma.float(), x0)
        return (eps - s * x0) / (1 + s**2).sqrt()  # v = alpha eps - sigma_vp x0, Salimans & Ho 2022

    def loss_weight(self, sigma: Tensor, snr_gamma: float | None = None) -> Tensor:
        """Weight (B,) of the squared error of the output: Min-SNR-gamma (Hang et al. 2023); None: ones.

        The paper weights the error of x0 by min(SNR, gamma), SNR = 1 / sigma^2; an error of the output is
        c_out times as large in x0, which gives min(SNR, gamma) / SNR for eps and / (SNR + 1) for v.
        """
        if snr_gamma is None:
            return torch.ones_like(sigma, dtype=torch.float32)
        _, _, c_out = self._coefficients(sigma)
        return c_out**2 * sigma.float().pow(-2).clamp(max=snr_gamma)

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip, c_out of x0 = c_skip x + c_out output(c_in x), of any shape: Karras et al. 2022, equation 7."""
        s = sigma.float()
        if self.prediction_type == "flow":
            return 1 / (1 + s), 1 / (1 + s), -s / (1 + s)
        c_in = (1 + s**2).sqrt().reciprocal()
        if self.prediction_type == "eps":
            return c_in, torch.ones_like(s), -s
        if self.prediction_type == "v":
            return c_in, c_in**2, -s * c_in
        return c_in, torch.zeros_like(s), torch.ones_like(s)

    @cached_property
    def _log_sigmas(self) -> Tensor:
        """The table as float32 levels carry it: without that a level would miss its own integer."""
        return self.sigmas.float().double().log()


@dataclass(frozen=True, eq=False)
class Preconditioning:
    """How a network is asked at some levels, and how its answers are read: Karras et al. 2022, section 5."""

    values: Tensor  # (4, ...) float32: timestep, and c_in, c_skip, c_out of x0 = c_skip x + c_out output(c_in x)

    def select(self, rows: Tensor) -> Preconditioning:
        """At the levels of these rows (K,), of (4, B)."""
        return Preconditioning(self.values.index_select(1, rows))

    def ask(self, network: Network, x: Tensor, learned_range: bool = False) -> Prediction:
        """What the network believes of rows x (B, ...), of (4, B); `learned_range` as `Scaling` has it."""
        timestep, *factors = self.values.unbind(0)
        c_in, c_skip, c_out = (per_row(factor, x) for factor in factors)
        output, variance = network(c_in * x, timestep).float(), None
        if learned_range:
            output, learned = output.chunk(2, 1)
            variance = (learned + 1) / 2  # the network says -1 of the smallest, 1 of the largest
        return Prediction(c_skip * x + c_out * output, variance)


def denoiser(network: Network, scaling: Scaling) -> Denoise:
    """Wrap a network as denoise(x, sigma) -> Prediction."""
    return lambda x, sigma: scaling.preconditioning(sigma).ask(network, x, scaling.learned_range)
