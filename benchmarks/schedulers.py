"""Each sampler beside the diffusers scheduler that it stands for: whole loops of both, from one start and one network.

    python benchmarks/schedulers.py [--result FILE]

A loop of ours is what a loaded checkpoint of that scheduler's configuration does (`gen.scheduler`, `gen.rows`); a loop
of theirs is what a diffusers pipeline does, with one CPU generator for each picture. The network is the best possible
one of pixels near -1 or 1. Where stock has a fault (docs/differences.md), its class is measured as it is and with the
fault mended. The result is kept in benchmarks/results/schedulers.json; the table printed is that of docs/schedulers.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from gen.conditioning import Condition, Conditions
from gen.rows import Row, Rows
from gen.scheduler import STOCK, NoiseLevels
from report import RESULTS, markdown, save
from training.provenance import provenance

SHAPE, SEEDS = (4, 3, 3), [0, 7, 2**32 - 1]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = {"leading": 1, "linspace": 0, "trailing": 0}  # with a steps_offset as published files have it
STEPS = (4, 13)  # the last does not divide 1000
WIDTH = 0.3  # of what pixels scatter by, around -1 and 1
BOUND = 1e-4  # of the largest number of a picture: what we may differ by

Network = Callable[[Tensor, Tensor | float], Tensor]
"""network(latent (B, ...), timestep, one for all or (B,)) -> what it predicts (B, ...)"""


# --- one network, and a loop of either over it -------------------------------------------------------------------


def network_of(kind: str, betas: Tensor) -> Network:
    """The best possible network of pixels near -1 or 1, written from alpha_bar and timesteps alone."""
    alpha_bar = (1 - betas).cumprod(0).double().clamp(min=1e-12).numpy()
    log_sigma = 0.5 * np.log((1 - alpha_bar) / alpha_bar)

    def network(latent: Tensor, timestep: Tensor | float) -> Tensor:
        at = torch.as_tensor(timestep, dtype=torch.float64).expand(len(latent))
        sigma = torch.from_numpy(np.exp(np.interp(at.numpy(), np.arange(len(log_sigma)), log_sigma)))
        s = sigma.reshape(-1, 1, 1, 1)
        alpha = 1 / (1 + s**2).sqrt()
        z = latent.double()
        x, spread = z / alpha, s**2 + WIDTH**2
        x0 = (WIDTH**2 * x + s**2 * (x / spread).tanh()) / spread  # E[x0 | x]
        eps = (z - alpha * x0) / (s * alpha)
        return {"eps": eps, "v": alpha * eps - s * alpha * x0, "x0": x0}[kind].float()

    return network


def stock_run(stock: SchedulerMixin, network: Network, steps: int, **step_options: Any) -> Tensor:
    """What a diffusers pipeline does, with one CPU generator per picture."""
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    noise = torch.stack([torch.randn(SHAPE, generator=rng) for rng in rngs])
    stock.set_timesteps(steps)
    x = noise * stock.init_noise_sigma
    takes = inspect.signature(stock.step).parameters
    draws = {"generator": rngs} if "generator" in takes and not isinstance(stock, HeunDiscreteScheduler) else {}
    for index, timestep in enumerate(stock.timesteps):
        output = network(stock.scale_model_input(x, timestep), timestep)
        if "prev_timestep" in takes:  # as UnCLIPPipeline tells it
            step_options["prev_timestep"] = next(iter(stock.timesteps[index + 1 :]), None)
        x = stock.step(output, timestep, x, **draws, **step_options).prev_sample
    return x


@torch.no_grad()
def our_run(stock: SchedulerMixin, network: Network, steps: int, **options: float) -> Tensor:
    """Ours: the sampler, levels and options that the stock scheduler stands for, through the engine's own loop."""
    levels = NoiseLevels.of(stock, type(stock).__name__)
    told = Condition()

    def asked(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return network(x, timestep)

    rows = Rows(asked, levels.scaling, "decoder")
    schedule, options = levels.schedule(levels.sampler, steps), levels.options(levels.sampler) | options
    rows.admit([Row(seed, seed, SHAPE, schedule, levels.sampler, told, options=options) for seed in SEEDS])
    done: dict[Any, Tensor] = {}
    while rows.live:
        tick = rows.tick()
        for failed in tick.failed:
            raise failed.error
        done |= {finished.row.key: finished.x for finished in tick.finished}
    return torch.stack([done[seed] for seed in SEEDS])


def stock_of(sampler: str, kind: str = "eps", **told: Any) -> SchedulerMixin:
    """The diffusers scheduler of a sampler, told what of this its class knows."""
    name, options = STOCK[sampler]
    made = getattr(diffusers, name)
    told = {**BETAS, "prediction_type": PREDICTION[kind], "clip_sample": False, **told, **options}
    return made(**{key: value for key, value in told.items() if key in known_to(sampler)})


def known_to(sampler: str) -> Mapping[str, Any]:
    """The options of a sampler's stock class."""
    return inspect.signature(getattr(diffusers, STOCK[sampler][0]).__init__).parameters


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number; NaN where theirs is."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- stock with its faults mended --------------------------------------------------------------------------------


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
    def step(self, output: Tensor, timestep: Tensor, *told: Any, **more: Any) -> Any:
        """As stock steps, elsewhere."""
        nearer = self.timesteps[self.timesteps < timestep]
        with going(self, int(timestep - (nearer.max() if len(nearer) else -1))):
            return super().step(output, timestep, *told, **more)


class MendedEuler(EulerDiscreteScheduler):
    """Euler written so that nothing cancels: from sigma 4096 stock's `x + slope * (next - now)` keeps 3 digits of x."""

    @wraps(EulerDiscreteScheduler.step)
    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, *told: Any, **more: Any) -> Any:
        """As stock steps, in another order."""
        done = super().step(output, timestep, sample, *told, **more)
        now, next = self.sigmas[self.step_index - 1 : self.step_index + 1]
        done.prev_sample = done.pred_original_sample + next / now * (sample - done.pred_original_sample)
        return done


class MendedAncestral(EulerAncestralDiscreteScheduler):
    """The same for Euler ancestral."""

    @wraps(EulerAncestralDiscreteScheduler.step)
    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, *told: Any, **more: Any) -> Any:
        """As stock steps, in another order."""
        done = super().step(output, timestep, sample, *told, **more)
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

    def multistep_dpm_solver_third_order_update(self, estimates: list[Tensor], **told: Any) -> Tensor:
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
        wrong = super().multistep_dpm_solver_third_order_update(estimates, **told)
        return (wrong + (right - has) * d2 / (1 + s_next**2).sqrt()).float()


class MendedUnCLIP(UnCLIPScheduler):
    """UnCLIPScheduler in float64: in float32 its weight of x0 in the last step is 1.0015 instead of 1."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.alphas_cumprod = self.alphas_cumprod.double()
        self.alphas = self.alphas_cumprod / torch.cat([self.one[None].double(), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas

    @wraps(UnCLIPScheduler.step)
    def step(self, *told: Any, **more: Any) -> Any:
        """As stock steps, to a latent in float32 as networks take it."""
        done = super().step(*told, **more)
        done.prev_sample = done.prev_sample.float()
        return done


def with_true_timesteps(kind: type[SchedulerMixin]) -> type[SchedulerMixin]:
    """A solver that tells the network the timestep of each respaced level, where stock rounds it."""

    class TrueTimesteps(kind):  # type: ignore[misc, valid-type]
        def set_timesteps(self, num_inference_steps: int, **told: Any) -> None:
            super().set_timesteps(num_inference_steps, **told)
            table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().double().log().numpy()
            visited = np.interp(self.sigmas[:-1].double().log().numpy(), table, np.arange(len(table)))
            self.timesteps = torch.from_numpy(visited)

    return TrueTimesteps


# --- what is compared --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A sampler beside its diffusers scheduler, told these options."""

    sampler: str
    told: Mapping[str, Any] = field(default_factory=dict)  # in the configuration
    asked: Mapping[str, float] = field(default_factory=dict)  # of a step, by both
    kinds: tuple[str, ...] = tuple(PREDICTION)
    mended: type[SchedulerMixin] | None = None  # None: stock needs no mending
    bound: float = BOUND
    name: str = ""  # as people call it, where it is not the sampler's

    @property
    def spelled(self) -> dict[str, str]:
        """What to ask of us, the class and what it is told, and what the network predicts."""
        more = "".join(f", {name}={value:g}" for name, value in self.asked.items())
        known, options = STOCK[self.sampler]
        told = "".join(f", {name}={value}" for name, value in {**options, **self.told}.items())
        name = f" ({self.name})" if self.name else ""
        return {"ours": f"`{self.sampler}`{more}{name}", "theirs": f"`{known}`{told}", "network": ", ".join(self.kinds)}

    def configs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the network predicts, and the configuration: every spacing that the class knows, and zero SNR."""
        known = known_to(self.sampler)
        has_one = self.sampler in ("dpmpp_2s", "lcm", "unclip")  # whatever they are told
        spacings = {"leading": 1} if has_one else SPACINGS
        for kind in self.kinds:
            for spacing, offset in spacings.items():
                yield kind, {"timestep_spacing": spacing, "steps_offset": offset, **self.told}
            # an eps network says nothing of a level without signal
            if "rescale_betas_zero_snr" in known and kind != "eps" and not self.respaced:
                for spacing in ("linspace", "trailing"):  # leading never visits the last level
                    yield kind, {"timestep_spacing": spacing, "rescale_betas_zero_snr": True, **self.told}

    @property
    def respaced(self) -> bool:
        """Whether levels are spaced by themselves and not by timesteps."""
        return any(name.startswith("use_") for name in self.told)


def mends(sampler: str) -> type[SchedulerMixin]:
    """The class of a sampler that tells true timesteps."""
    return with_true_timesteps(getattr(diffusers, STOCK[sampler][0]))


KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
PEERS = (
    Peer("ddim", mended=MendedDDIM),
    Peer("ddim", asked={"eta": 0.6}, mended=MendedDDIM),
    Peer("ddim", {"clip_sample": True}, mended=MendedDDIM),
    Peer("ddpm"),
    Peer("ddpm", {"clip_sample": True}),
    Peer("euler", mended=MendedEuler),
    Peer("euler", KARRAS),
    Peer("euler", EXPONENTIAL),
    Peer("euler_ancestral", kinds=("eps", "v"), mended=MendedAncestral),
    Peer("heun"),
    Peer("heun", KARRAS),
    Peer("lms"),
    Peer("lms", KARRAS),
    Peer("pndm", kinds=("eps", "v"), mended=MendedPNDM),
    Peer("dpmpp_2m", name="DPM++ 2M"),
    Peer("dpmpp_2m", KARRAS, mended=mends("dpmpp_2m"), name="DPM++ 2M Karras"),
    Peer("dpmpp_2m", EXPONENTIAL, mended=mends("dpmpp_2m")),
    Peer("dpmpp_2m_sde", name="DPM++ 2M SDE"),
    Peer("dpmpp_2m_sde", KARRAS, mended=mends("dpmpp_2m_sde"), name="DPM++ 2M SDE Karras"),
    Peer("dpmpp_2s", name="DPM++ 2S"),
    Peer("dpmpp_3m", mended=Mended3M, name="DPM++ 3M"),
    Peer("dpmpp_3m_sde", mended=Mended3M, name="DPM++ 3M SDE"),
    Peer("dpm_2", kinds=("eps", "v")),
    Peer("dpm_2_ancestral", kinds=("eps", "v")),
    Peer("unipc"),
    Peer("unipc", {"solver_order": 3}),
    Peer("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    Peer("unipc", KARRAS, mended=mends("unipc")),
    Peer("deis"),
    Peer("deis", {"solver_order": 3}),
    Peer("lcm"),
    Peer("unclip", kinds=("x0",), mended=MendedUnCLIP),
    Peer("unclip", {"clip_sample": True}, kinds=("x0",), mended=MendedUnCLIP),
    # its first level is sigma 20291, where the last digit of a float32 eps is 1e-3 of x0
    Peer("unclip", kinds=("eps",), bound=5e-3),
)


@dataclass(frozen=True)
class Found:
    """How far a sampler is from its peer, at most over all that was compared."""

    right: float  # from stock with its fault mended, or from stock as it is where it has none
    stock: float | None  # from stock as it is; None: it has no fault
    loops: int


def compare(peer: Peer) -> Found:
    """Whole loops of both, over every kind of network, spacing and number of steps."""
    right, as_it_is = [], []
    for kind, config in peer.configs():
        stock = stock_of(peer.sampler, kind, **config)
        network = network_of(kind, stock.betas.float())
        for steps in STEPS:
            ours = our_run(stock, network, steps, **peer.asked)
            theirs = stock_run(stock_of(peer.sampler, kind, **config), network, steps, **peer.asked)
            as_it_is.append(apart(ours, theirs))
            if peer.mended is not None:
                told = {name: value for name, value in stock.config.items() if name in known_to(peer.sampler)}
                theirs = stock_run(peer.mended(**told), network, steps, **peer.asked)
            right.append(apart(ours, theirs))
    return Found(worst(right), worst(as_it_is) if peer.mended else None, len(right))


def worst(numbers: list[float]) -> float:
    """The largest; NaN where any is, which `max` would lose."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def main(result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "schedulers.json") -> None:
    """Measure every pair."""
    found = [(peer, compare(peer)) for peer in PEERS]
    pairs = [{**peer.spelled, **vars(each)} for peer, each in found]
    save({"pairs": pairs, "shape": SHAPE, "steps": STEPS, **provenance()}, result)
    print(table(pairs))


def table(pairs: list[dict[str, Any]]) -> str:
    """As docs/schedulers.md has it."""
    columns = ["ours", "diffusers", "network", "loops", "largest difference", "from stock with its fault"]
    return markdown(columns, (_cells(pair) for pair in pairs))


def _cells(pair: Mapping[str, Any]) -> list[str]:
    stock = "" if pair["stock"] is None else f"{pair['stock']:.0e}"
    return [pair["ours"], pair["theirs"], pair["network"], str(pair["loops"]), f"{pair['right']:.0e}", stock]


if __name__ == "__main__":
    typer.run(main)
