"""The samplers, each beside the diffusers scheduler that it stands for, and whole loops of both compared.

A loop of ours is what a loaded checkpoint of that scheduler's configuration does (`gen.scheduler`, `gen.rows`); a loop
of theirs is what a diffusers pipeline does, with one CPU generator for each picture. The network is the best possible
one of pixels near -1 or 1. Where stock has a fault, it is compared as it is and mended.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from gen.conditioning import Condition, Conditions
from gen.rows import Row, Rows
from gen.scheduler import STOCK, NoiseLevels
from mended import Mended3M, MendedAncestral, MendedDDIM, MendedEuler, MendedPNDM, MendedUnCLIP, with_true_timesteps

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
    condition = Condition()

    def asked(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return network(x, timestep)

    rows = Rows(asked, levels.scaling, "decoder")
    schedule, options = levels.schedule(levels.sampler, steps), levels.options(levels.sampler) | options
    rows.admit([Row(seed, seed, SHAPE, schedule, levels.sampler, condition, options=options) for seed in SEEDS])
    done: dict[Any, Tensor] = {}
    while rows.live:
        tick = rows.tick()
        for failed in tick.failed:
            raise failed.error
        done |= {finished.row.key: finished.x for finished in tick.finished}
    return torch.stack([done[seed] for seed in SEEDS])


def stock_of(sampler: str, kind: str = "eps", **config: Any) -> SchedulerMixin:
    """The diffusers scheduler of a sampler, told what of this its class knows."""
    name, options = STOCK[sampler]
    made = getattr(diffusers, name)
    config = {**BETAS, "prediction_type": PREDICTION[kind], "clip_sample": False, **config, **options}
    return made(**{key: value for key, value in config.items() if key in known_to(sampler)})


def known_to(sampler: str) -> Mapping[str, Any]:
    """The options of a sampler's stock class."""
    return inspect.signature(getattr(diffusers, STOCK[sampler][0]).__init__).parameters


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number; NaN where theirs is."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- what is compared --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A sampler beside its diffusers scheduler, told these options."""

    sampler: str
    config: Mapping[str, Any] = field(default_factory=dict)  # in the configuration
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
        listed = "".join(f", {name}={value}" for name, value in {**options, **self.config}.items())
        name = f" ({self.name})" if self.name else ""
        return {
            "ours": f"`{self.sampler}`{more}{name}",
            "theirs": f"`{known}`{listed}",
            "network": ", ".join(self.kinds),
        }

    def configs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the network predicts, and the configuration: every spacing that the class knows, and zero SNR."""
        known = known_to(self.sampler)
        has_one = self.sampler in ("dpmpp_2s", "lcm", "unclip")  # whatever they are told
        spacings = {"leading": 1} if has_one else SPACINGS
        for kind in self.kinds:
            for spacing, offset in spacings.items():
                yield kind, {"timestep_spacing": spacing, "steps_offset": offset, **self.config}
            # an eps network says nothing of a level without signal
            if "rescale_betas_zero_snr" in known and kind != "eps" and not self.respaced:
                for spacing in ("linspace", "trailing"):  # leading never visits the last level
                    yield kind, {"timestep_spacing": spacing, "rescale_betas_zero_snr": True, **self.config}

    @property
    def respaced(self) -> bool:
        """Whether levels are spaced by themselves and not by timesteps."""
        return any(name.startswith("use_") for name in self.config)


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
                known_config = {name: value for name, value in stock.config.items() if name in known_to(peer.sampler)}
                theirs = stock_run(peer.mended(**known_config), network, steps, **peer.asked)
            right.append(apart(ours, theirs))
    return Found(worst(right), worst(as_it_is) if peer.mended else None, len(right))


def worst(numbers: list[float]) -> float:
    """The largest; NaN where any is, which `max` would lose."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)
