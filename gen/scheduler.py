"""What a diffusers scheduler configuration says, in this project's words.

`NoiseLevels` is built from a stock scheduler object and answers three questions: how the network is
parameterised (`scaling`), which sampler the checkpoint itself uses, and which levels a run of a given sampler
steps through. A sampler other than the checkpoint's own means what it means in diffusers: that class, built
`from_config` of the checkpoint's. The stock object is only read; nothing here steps it, and nothing here
knows networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from samplers.scaling import Kind, Scaling
from samplers.schedule import EXACT_ZERO_SNR_SIGMA, ZERO_SNR_SIGMA, Schedule, exponential, from_betas, karras

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

STOCK: dict[str, tuple[str, dict[str, str]]] = {  # our sampler -> the diffusers class that it equals, with options
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
SIGMA_SPACE = ("euler", "euler_ancestral", "heun")  # stock holds x as it is, not at unit variance

# What we can do of each option; a checkpoint that asks for anything else is refused.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": tuple(KINDS),
    "clip_sample": (False,),
    "thresholding": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", None),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
}


@dataclass(frozen=True)
class NoiseLevels:
    """A network's noise levels: those it was trained on, and those each sampler steps through."""

    stock: SchedulerMixin
    sampler: str  # the checkpoint's own
    scaling: Scaling
    where: str  # the file it was read from, for errors
    _known: dict[tuple[str, int], Schedule] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, stock: SchedulerMixin, where: str) -> NoiseLevels:
        """Read a stock scheduler; ValueError for a class or an option that has no equal here."""
        name = type(stock).__name__
        options = {"algorithm_type": stock.config["algorithm_type"]} if "algorithm_type" in stock.config else {}
        own = [sampler for sampler, told in STOCK.items() if told == (name, options)]
        if not own:
            choices = ", ".join(sorted({stock_name for stock_name, _ in STOCK.values()}))
            raise ValueError(f"{where}: scheduler {name} {options or ''} is not supported; choose from: {choices}")
        check_options(stock, where)
        # The lower stand-in for a level without signal: the higher one is then the last timestep as well.
        scaling = Scaling.from_betas(KINDS[stock.config["prediction_type"]], stock.betas, ZERO_SNR_SIGMA)
        return cls(stock, own[0], scaling, where)

    @property
    def num_train_timesteps(self) -> int:
        """The most steps a run can take."""
        return len(self.scaling.sigmas)

    def schedule(self, sampler: str, num_steps: int) -> Schedule:
        """The levels that the stock class of this sampler visits in so many steps."""
        if (sampler, num_steps) not in self._known:
            self._known[sampler, num_steps] = self._schedule(sampler, num_steps)
        return self._known[sampler, num_steps]

    def _schedule(self, sampler: str, num_steps: int) -> Schedule:
        name, options = STOCK[sampler]
        stock = self.stock
        if sampler != self.sampler:
            stock = getattr(diffusers, name).from_config(dict(self.stock.config), **options)
            check_options(stock, f"{self.where} as {sampler}")
        config = stock.config
        final = "zero"
        if config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False:
            final = "sigma_min"
        multistep, sigma_space = sampler.startswith("dpmpp"), sampler in SIGMA_SPACE
        max_sigma = EXACT_ZERO_SNR_SIGMA if sampler in ("ddim", "ddpm") else ZERO_SNR_SIGMA
        levels = from_betas(
            stock.betas,
            num_steps,
            spacing=config["timestep_spacing"],
            steps_offset=config.get("steps_offset", 0),
            final=final,  # type: ignore[arg-type]
            max_sigma=max_sigma,
            unit_variance=not sigma_space,
            whole=not sigma_space,
            beyond_last=multistep,
        )
        for option, respaced in (("use_karras_sigmas", karras), ("use_exponential_sigmas", exponential)):
            if config.get(option):
                # diffusers spans the whole table for DPM-Solver and the visited timesteps for the others
                high, low = levels.sigmas[0].item(), levels.sigmas[num_steps - 1].item()
                if multistep:
                    low, high = self.scaling.sigmas[0].item(), self.scaling.sigmas[-1].item()
                return respaced(num_steps, low, high, last=levels.sigmas[-1].item(), unit_variance=not sigma_space)
        return levels


def check_options(stock: SchedulerMixin, where: str) -> None:
    """ValueError for an option of a stock scheduler that has no equal here."""
    for option, allowed in ALLOWED.items():
        if option in stock.config and stock.config[option] not in allowed:
            told = ", ".join(repr(value) for value in allowed)
            raise ValueError(f"{where}: {option}={stock.config[option]!r} is not supported; choose from: {told}")
