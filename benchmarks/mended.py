"""Stock schedulers with their faults mended (docs/differences.md): what a correct one of their kind paints.

Knows nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor


@contextmanager
def going(stock: DDIMScheduler | PNDMScheduler, way: int) -> Iterator[None]:
    """Stock that steps so many timesteps, where it has `T // N` for the way to the next."""
    whole = stock.num_inference_steps
    stock.num_inference_steps = Fraction(stock.config.num_train_timesteps, way)  # T // this is the way
    try:
        yield
    finally:
        stock.num_inference_steps = whole


class MendedDDIM(DDIMScheduler):
    """DDIM that steps to the timestep it visits next."""

    @wraps(DDIMScheduler.step)
    def step(self, output: Tensor, timestep: Tensor, *args: Any, **more: Any) -> Any:
        """As stock steps, elsewhere."""
        nearer = self.timesteps[self.timesteps < timestep]
        with going(self, int(timestep - (nearer.max() if len(nearer) else -1))):
            return super().step(output, timestep, *args, **more)


class MendedEuler(EulerDiscreteScheduler):
    """Euler written so that nothing cancels: from sigma 4096 stock's `x + slope * (next - now)` keeps 3 digits of x."""

    @wraps(EulerDiscreteScheduler.step)
    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **more: Any) -> Any:
        """As stock steps, in another order."""
        done = super().step(output, timestep, sample, *args, **more)
        now, next = self.sigmas[self.step_index - 1 : self.step_index + 1]
        done.prev_sample = done.pred_original_sample + next / now * (sample - done.pred_original_sample)
        return done


class MendedAncestral(EulerAncestralDiscreteScheduler):
    """The same for Euler ancestral."""

    @wraps(EulerAncestralDiscreteScheduler.step)
    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **more: Any) -> Any:
        """As stock steps, in another order."""
        done = super().step(output, timestep, sample, *args, **more)
        now, next = self.sigmas[self.step_index - 1 : self.step_index + 1]
        x0 = done.pred_original_sample
        up = (next**2 * (now**2 - next**2) / now**2) ** 0.5
        # to the bit as stock has it
        noise = done.prev_sample - (sample + (sample - x0) / now * ((next**2 - up**2) ** 0.5 - now))
        done.prev_sample = x0 + (next / now) ** 2 * (sample - x0) + noise
        return done


class MendedPNDM(PNDMScheduler):
    """PNDM that steps to the timestep it visits next, and mixes noise predictions whatever the network says."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config | {"prediction_type": "epsilon"})
        self.speaks_v = config["prediction_type"] == "v_prediction"

    @wraps(PNDMScheduler.step)
    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> Any:
        """As stock steps, elsewhere."""
        alpha_bar = self.alphas_cumprod[timestep]
        if self.speaks_v:
            output = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * sample
        # the second is visited twice, and both times stock goes from the first
        visited = [*self.timesteps.unique().flip(0).tolist(), -1]
        at = max(self.counter - 1, 0)
        with going(self, visited[at] - visited[at + 1]):
            return super().step(output, timestep, sample, **more)


class Mended3M(DPMSolverMultistepScheduler):
    """DPM-Solver++(3M) with the coefficient of its third-order step's second difference made right.

    With D2 = h^2 f[0, 1, 2], the integral of the parabola has D2 times that of (u / h)^2. Stock has half of that in
    its ODE form (as k-diffusion and the authors' code have it), and minus one and a half where it should have a
    third of h, for small h, in its SDE form, whose 0.5 has the wrong sign.
    """

    def multistep_dpm_solver_third_order_update(self, estimates: list[Tensor], **kwargs: Any) -> Tensor:
        """As stock, and what its coefficient lacks."""
        at = self.step_index
        s_next, s0, s1, s2 = self.sigmas[[at + 1, at, at - 1, at - 2]].double()
        h, h0, h1 = (s0 / s_next).log(), (s1 / s0).log(), (s2 / s1).log()
        m0, m1, m2 = estimates[-1], estimates[-2], estimates[-3]
        d2 = h**2 * ((m0 - m1) / h0 - (m1 - m2) / h1) / (h0 + h1)
        if self.config.algorithm_type == "dpmsolver++":
            z, has = h, 0.5 - ((-h).exp() - 1 + h) / h**2
        else:
            z, has = 2 * h, (1 - (-2 * h).exp() - 2 * h) / (2 * h) ** 2 - 0.5
        right = 1 - 2 / z * (1 - (1 - (-z).exp()) / z)
        wrong = super().multistep_dpm_solver_third_order_update(estimates, **kwargs)
        return (wrong + (right - has) * d2 / (1 + s_next**2).sqrt()).float()


class MendedUnCLIP(UnCLIPScheduler):
    """UnCLIPScheduler in float64: in float32 its weight of x0 in the last step is 1.0015 instead of 1."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.alphas_cumprod = self.alphas_cumprod.double()
        self.alphas = self.alphas_cumprod / torch.cat([self.one[None].double(), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas

    @wraps(UnCLIPScheduler.step)
    def step(self, *args: Any, **more: Any) -> Any:
        """As stock steps, to a latent in float32 as networks take it."""
        done = super().step(*args, **more)
        done.prev_sample = done.prev_sample.float()
        return done


def with_true_timesteps(kind: type[SchedulerMixin]) -> type[SchedulerMixin]:
    """A solver that tells the network the timestep of each respaced level, where stock rounds it."""

    class TrueTimesteps(kind):  # type: ignore[misc, valid-type]
        def set_timesteps(self, num_inference_steps: int, **kwargs: Any) -> None:
            super().set_timesteps(num_inference_steps, **kwargs)
            table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().double().log().numpy()
            visited = np.interp(self.sigmas[:-1].double().log().numpy(), table, np.arange(len(table)))
            self.timesteps = torch.from_numpy(visited)

    return TrueTimesteps
