"""What a diffusers scheduler configuration says, in this project's words.

`NoiseLevels` is built from a stock scheduler object and answers four questions: how the network is
parameterised (`scaling`), which sampler the checkpoint itself uses, which levels a run of a given sampler steps
through, and what that sampler's options are. A sampler other than the checkpoint's own means what it means in
diffusers: that class, built `from_config` of the checkpoint's, over the checkpoint's own betas. The stock object
is only read; nothing here steps it, and nothing here knows networks.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from samplers.sample import SAMPLERS
from samplers.scaling import PredictionType, Scaling
from samplers.schedule import (
    EXACT_ZERO_SNR_SIGMA,
    ZERO_SNR_SIGMA,
    Final,
    Schedule,
    Spacing,
    exponential,
    from_timesteps,
    karras,
    lcm_timesteps,
    spaced_timesteps,
)

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]

PREDICTION_TYPE_OF: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

STOCK: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> the diffusers class that it equals, with options
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unclip": ("UnCLIPScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


# --- Which training timesteps a class visits: (config, number of steps, number of training timesteps) -> (N,) ---

Timesteps = Callable[[Config, int, int], Tensor]


def _spaced(config: Config, num_steps: int, num_train: int, **rounding: bool) -> Tensor:
    offset = config.get("steps_offset", 0)
    return spaced_timesteps(num_steps, num_train, spacing=config["timestep_spacing"], steps_offset=offset, **rounding)


def _between(config: Config, num_steps: int, num_train: int) -> Tensor:
    return _spaced(config, num_steps, num_train, whole=False)


def _beyond(config: Config, num_steps: int, num_train: int) -> Tensor:
    return _spaced(config, num_steps, num_train, beyond_last=True)


def _singlestep(config: Config, num_steps: int, num_train: int) -> Tensor:
    return spaced_timesteps(num_steps, num_train, spacing="linspace", beyond_last=True)


def _plms(config: Config, num_steps: int, num_train: int) -> Tensor:
    timesteps = _spaced(config, num_steps, num_train)
    return torch.cat([timesteps[:2], timesteps[1:]])  # the second twice: one step more than was asked for


def _unclip(config: Config, num_steps: int, num_train: int) -> Tensor:
    if num_steps == 1:  # from noise to a picture; stock divides by zero
        return torch.tensor([num_train - 1], dtype=torch.float64)
    return spaced_timesteps(num_steps, num_train, spacing="linspace")


def _lcm(config: Config, num_steps: int, num_train: int) -> Tensor:
    return lcm_timesteps(num_steps, num_train, config["original_inference_steps"])


# --- What there is to know of each class ---


@dataclass(frozen=True)
class Stock:
    """A diffusers scheduler class: which levels it visits, and what we can do of its options."""

    timesteps: Timesteps
    unit_variance: bool = True  # whether it holds x at unit variance; False: as it is
    max_sigma: float = EXACT_ZERO_SNR_SIGMA  # of a level without signal
    final: Final | None = None  # None: as its options say
    spans_table: bool = False  # whether Karras levels span all training levels; False: those visited
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # over what is in `ALLOWED`


_CLIPS = {"clip_sample": (True, False)}
_SIGMA_SPACE = Stock(_between, unit_variance=False, max_sigma=ZERO_SNR_SIGMA)
_SOLVER = Stock(_beyond, max_sigma=ZERO_SNR_SIGMA, spans_table=True)

CLASSES = {
    "DDIMScheduler": Stock(_spaced, allowed=_CLIPS),
    "DDPMScheduler": Stock(_spaced, allowed=_CLIPS),
    "DEISMultistepScheduler": replace(_SOLVER, final="sigma_min", allowed={"solver_type": ("logrho",)}),
    "DPMSolverMultistepScheduler": replace(_SOLVER, allowed={"solver_type": ("midpoint",)}),
    "DPMSolverSinglestepScheduler": replace(_SOLVER, timesteps=_singlestep, allowed={"solver_type": ("midpoint",)}),
    "EulerAncestralDiscreteScheduler": _SIGMA_SPACE,
    "EulerDiscreteScheduler": _SIGMA_SPACE,
    "HeunDiscreteScheduler": _SIGMA_SPACE,
    "KDPM2AncestralDiscreteScheduler": _SIGMA_SPACE,
    "KDPM2DiscreteScheduler": _SIGMA_SPACE,
    "LCMScheduler": Stock(_lcm, final="zero", allowed=_CLIPS),
    "LMSDiscreteScheduler": _SIGMA_SPACE,
    "PNDMScheduler": Stock(_plms),
    "UnCLIPScheduler": Stock(_unclip, allowed={**_CLIPS, "variance_type": ("fixed_small_log", "learned_range")}),
    "UniPCMultistepScheduler": replace(_SOLVER, allowed={"solver_type": ("bh1", "bh2")}),
}

# Options that are done as they say, whatever they say.
HONOURED = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("steps_offset", "set_alpha_to_one", "clip_sample_range", "use_karras_sigmas", "use_exponential_sigmas"),
    *("lower_order_final", "euler_at_final", "original_inference_steps", "skip_prk_steps", "algorithm_type"),
}
# Options that say nothing unless another is on, which is then refused: of thresholding, flows, moving shifts.
IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "shift_terminal"}

# What we can do of each other option; a checkpoint that asks for anything else is refused.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": tuple(PREDICTION_TYPE_OF),
    "timestep_spacing": get_args(Spacing),
    "final_sigmas_type": get_args(Final),
    "clip_sample": (False,),
    "thresholding": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", "fixed_small_log", "learned_range", None),  # the first two are one
    "solver_order": (1, 2, 3),
    "lambda_min_clipped": (-math.inf,),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "timestep_scaling": (10.0,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
}


@dataclass(frozen=True)
class NoiseLevels:
    """A network's noise levels: those it was trained on, and those each sampler steps through."""

    stock: SchedulerMixin
    sampler: str  # the checkpoint's own
    scaling: Scaling
    where: str  # the file it was read from, for errors
    _schedules: dict[tuple[str, int], Schedule] = field(default_factory=dict, repr=False, compare=False)
    _configs: dict[str, Config] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, stock: SchedulerMixin, where: str) -> NoiseLevels:
        """Read a stock scheduler; ValueError for a class or an option that has no equal here."""
        sampler = _own_sampler(stock, where)
        config = _checked(stock, where)
        # The lower stand-in for a level without signal: the higher one is then the last timestep as well.
        scaling = Scaling.from_betas(PREDICTION_TYPE_OF[config["prediction_type"]], stock.betas, ZERO_SNR_SIGMA)
        scaling = replace(scaling, learned_range=config.get("variance_type") == "learned_range")
        return cls(stock, sampler, scaling, where)

    @property
    def num_train_timesteps(self) -> int:
        """The most steps a run can take."""
        return len(self.scaling.sigmas)

    def schedule(
        self,
        sampler: str,
        num_steps: int,
        skipped: int = 0,  # steps left out at the beginning
        start: float = 0.0,  # the share of the training timesteps behind which a run goes on; 0: it begins
        end: float = 1.0,  # that at which it ends, for another to go on; 1: it ends with a picture
    ) -> Schedule:
        """The levels that the stock class of this sampler visits in so many steps, or in some of these.

        A run that begins or ends on the way has all of them, for samplers that go by their number. As in diffusers
        `start` and `end` are rounded to a timestep, and one run ends where the other goes on.
        """
        if (sampler, num_steps) not in self._schedules:
            self._schedules[sampler, num_steps] = self._schedule(sampler, num_steps)
        run = self._schedules[sampler, num_steps]
        if sampler == "pndm" and skipped:
            skipped += 1  # its second level comes twice
        if first := self._passed(run, start) if start else skipped:
            run = replace(run, first=first)
        if sampler == "pndm" and first:  # a run from the middle has its own second level twice
            sigmas = run.sigmas[max(first, 2) :]
            run = replace(run, first=0, sigmas=torch.cat([sigmas[:2], sigmas[1:]]) if len(sigmas) > 2 else sigmas)
        if start:
            run = replace(run, resumed_scale=1 / self._handed(sampler, run.sigmas[run.first].item()))
        if end < 1 and (stop := self._passed(run, end)) < run.last:
            run = replace(run, stop=stop, end_scale=self._handed(sampler, run.sigmas[stop].item()))
        return run

    def _passed(self, run: Schedule, share: float) -> int:
        """How many steps of a run begin before a share of the training timesteps is behind it."""
        cutoff = round((1 - share) * self.num_train_timesteps)
        if cutoff == self.num_train_timesteps:
            return 0
        return int((run.sigmas[:-1] >= self.scaling.sigmas[cutoff]).sum())

    def _handed(self, sampler: str, sigma: float) -> float:
        """What x at a level is multiplied by as the stock class of this sampler holds it."""
        return 1 / math.hypot(1, sigma) if CLASSES[STOCK[sampler][0]].unit_variance else 1.0

    def options(self, sampler: str) -> dict[str, float]:
        """This sampler's options as the configuration has them; those it does not speak of are left out."""
        config = self._config(sampler)
        options = {name: float(config[name]) for name in SAMPLERS[sampler].defaults if name in config}
        if sampler == "unipc":
            options["bh1"] = float(config["solver_type"] == "bh1")
        if "clip" in SAMPLERS[sampler].defaults:
            options["clip"] = float(config["clip_sample_range"]) if config["clip_sample"] else math.inf
        if "learned" in SAMPLERS[sampler].defaults:
            options["learned"] = float(config["variance_type"] == "learned_range")
        return options

    def _config(self, sampler: str) -> Config:
        """What the stock class of this sampler is told; ValueError for an option that has no equal here."""
        if sampler not in self._configs:
            name, options = STOCK[sampler]
            stock, where = self.stock, self.where
            if sampler != self.sampler:
                stock = getattr(diffusers, name).from_config(dict(stock.config), **options)
                where = f"{where} as {sampler}"
            self._configs[sampler] = config = _checked(stock, where)
            if config.get("clip_sample") and "clip_sample" not in self.stock.config:
                logger.warning(
                    "%s: estimates are clipped to %s, for clip_sample is not said and diffusers' %s clips then",
                    *(where, config["clip_sample_range"], name),
                )
        return self._configs[sampler]

    def _schedule(self, sampler: str, num_steps: int) -> Schedule:
        config, stock = self._config(sampler), CLASSES[STOCK[sampler][0]]
        held_low = config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False
        # diffusers' leading levels leave room for the signal in the first noise
        unit_start = stock.unit_variance or config["timestep_spacing"] == "leading"
        levels = from_timesteps(
            self.stock.betas,
            stock.timesteps(config, num_steps, self.num_train_timesteps),
            final=stock.final or ("sigma_min" if held_low else "zero"),
            max_sigma=stock.max_sigma,
            unit_variance=stock.unit_variance,
            unit_start=unit_start,
        )
        for option, respaced in (("use_karras_sigmas", karras), ("use_exponential_sigmas", exponential)):
            if config.get(option):
                low, high = (self.scaling.sigmas[[0, -1]] if stock.spans_table else levels.sigmas[[-2, 0]]).tolist()
                return respaced(
                    num_steps,
                    low,
                    high,
                    last=levels.sigmas[-1].item(),
                    unit_variance=stock.unit_variance,
                    unit_start=unit_start,
                )
        return levels


def _own_sampler(stock: SchedulerMixin, where: str) -> str:
    """The sampler that equals a stock scheduler."""
    name = type(stock).__name__
    deciding = {key for known, options in STOCK.values() if known == name for key in options}
    decided = {key: value for key, value in stock.config.items() if key in deciding}
    for sampler, (known, options) in STOCK.items():
        if known == name and options == decided:
            return sampler
    choices = ", ".join(sorted(_spelled(*known) for known in STOCK.values()))
    raise ValueError(f"{where}: scheduler {_spelled(name, decided)} is not supported; choose from: {choices}")


def _spelled(name: str, options: Config) -> str:
    listed = ", ".join(f"{key}={value!r}" for key, value in sorted(options.items()))
    return f"{name}({listed})" if listed else name


def _checked(stock: SchedulerMixin, where: str) -> Config:
    """What a stock scheduler is told, of what its class knows; ValueError for what has no equal here.

    Options of other classes are left to those, as in diffusers; one that no class knows is refused.
    """
    known = inspect.signature(type(stock).__init__).parameters
    config = {key: value for key, value in stock.config.items() if key in known}
    here = {**ALLOWED, **CLASSES[type(stock).__name__].allowed}
    for option, value in config.items():
        if option in HONOURED | IDLE:
            continue
        allowed = here.get(option, (known[option].default,))
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(f"{where}: {option}={value!r} is not supported; choose from: {choices}")
    ours = HONOURED | IDLE | ALLOWED.keys() | config.keys()
    for option in stock.config:
        if option not in ours and not option.startswith("_") and option not in _all_options():
            raise ValueError(f"{where}: option {option!r} is known to no scheduler of diffusers; leave it out")
    return config


@cache
def _all_options() -> frozenset[str]:
    """The options that any scheduler class of diffusers knows."""
    return frozenset(
        option
        for name in dir(diffusers)
        if name.endswith("Scheduler") and issubclass(kind := getattr(diffusers, name), ConfigMixin)
        for option in inspect.signature(kind.__init__).parameters
    )
