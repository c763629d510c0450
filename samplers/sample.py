"""The samplers by name, `start` and `advance`: how a state begins, and the one way it moves.

There is no loop here: whoever holds the rows (an engine, an example, a test) calls `advance` once a step,
with rows at whatever levels they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers import adams, ddpm, dpm, dpmpp, euler, heun, lcm, unipc
from samplers.state import Denoise, Level, State, per_row

Step = Callable[[Denoise, State, Level, Level, Tensor | None, dict[str, Tensor]], State]
"""step(denoise, state, now, next, noise (B, ...) or None, options (B,) each) -> the state at the next level"""
Again = Callable[[float, float, Mapping[str, float]], float]
"""again(sigma, sigma_next, options) -> the level at which a step asks the network a second time"""


@dataclass(frozen=True)
class Sampler:
    """A step, what each of its options is where a caller says nothing, and what its rows remember."""

    step: Step
    defaults: Mapping[str, float] = field(default_factory=dict)
    # The options that add noise where they are above 0. One of them at most is so in a row: no step draws twice.
    noise: tuple[str, ...] = ()
    past: int = 0  # estimates of earlier steps, as memory "past" (B, past, ...) at levels "sigma" (B, past)
    begun: bool = False  # whether x at an earlier level is kept, as memory "x" (B, ...)
    again: Again | None = None  # the level of a step's second question; None: it asks once, where it begins

    def begin(self, x: Tensor) -> State:
        """Rows (B, ...) that remember nothing yet."""
        memory = {}
        if self.past:
            # level 0 marks an empty place: no estimate is ever made there
            memory = {"past": x.new_zeros(len(x), self.past, *x.shape[1:]), "sigma": x.new_zeros(len(x), self.past)}
        if self.begun:
            memory["x"] = torch.zeros_like(x)
        return State(x, memory)


# Defaults are diffusers' own.
_LAST = {"lower_order_final": 1.0, "euler_at_final": 0.0}
_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
# Stock clips to 1 unless it is told not to; what a checkpoint is told, its configuration says.
_CLIP = {"clip": math.inf}
_DDPM = {"eta": 1.0, "learned": 1.0, **_CLIP}
_ETA = ("eta",)

SAMPLERS = {
    "ddim": Sampler(euler.ddim, {"eta": 0.0, **_CLIP}, _ETA),
    "ddpm": Sampler(ddpm.step, _DDPM, _ETA),
    "deis": Sampler(adams.deis, {"solver_order": 2.0, "lower_order_final": 1.0}, past=2),
    "dpm_2": Sampler(dpm.step, {"eta": 0.0}, _ETA, again=dpm.middle),
    "dpm_2_ancestral": Sampler(dpm.step, {"eta": 1.0}, _ETA, again=dpm.middle),
    "dpmpp_2m": Sampler(dpmpp.multistep, {"eta": 0.0, **_LAST}, _ETA, past=1),
    "dpmpp_2m_sde": Sampler(dpmpp.multistep, {"eta": 1.0, **_LAST}, _ETA, past=1),
    "dpmpp_2s": Sampler(dpmpp.singlestep, {"lower_order_final": 0.0}, past=1, begun=True),
    "dpmpp_3m": Sampler(dpmpp.multistep, {"eta": 0.0, **_LAST}, _ETA, past=2),
    "dpmpp_3m_sde": Sampler(dpmpp.multistep, {"eta": 1.0, **_LAST}, _ETA, past=2),
    "euler": Sampler(euler.step, {"eta": 0.0, **_CHURN}, ("eta", "s_churn")),
    "euler_ancestral": Sampler(euler.ancestral, {"eta": 1.0}, _ETA),
    "heun": Sampler(heun.step, _CHURN, ("s_churn",), again=heun.end),
    "lcm": Sampler(lcm.step, {"eta": 1.0, **_CLIP}, _ETA),
    "lms": Sampler(adams.lms, past=3),
    "pndm": Sampler(adams.pndm, past=3),
    "unclip": Sampler(ddpm.step, _DDPM, _ETA),
    "unipc": Sampler(unipc.step, {"solver_order": 2.0, "bh1": 0.0, "lower_order_final": 1.0}, past=3, begun=True),
}


def needs_noise(sampler: str, options: Mapping[str, Tensor] | None = None) -> bool:
    """Whether `advance` has to be given noise: an option that adds some is, or may be, above zero."""
    chosen = _find(sampler)
    return any(name in (options or {}) or chosen.defaults[name] > 0 for name in chosen.noise)


def start(sampler: str, noise: Tensor, scale: Tensor) -> State:
    """Rows of pure noise: unit noise (B, ...) times each row's `Schedule.start_scale` (B,)."""
    return _find(sampler).begin(noise.float() * per_row(scale.float(), noise))


def start_from(sampler: str, x0: Tensor, noise: Tensor, sigma: Tensor) -> State:
    """Rows that begin at a clean picture noised to sigma (B,): SDEdit (Meng et al. 2022), img2img."""
    return _find(sampler).begin(x0.float() + noise.float() * per_row(sigma.float(), noise))


def advance(
    sampler: str,
    denoise: Denoise,
    state: State,
    now: Level,
    next: Level,
    noise: Tensor | None = None,  # (B, ...) unit noise; None where `needs_noise` is False
    options: Mapping[str, Tensor] | None = None,  # (B,) each; None: the sampler's defaults
) -> State:
    """Every row one step on, from its level `now` to its level `next` (not above it; it may be 0).

    What the state remembers beyond its sampler's own is handed on. Raises ValueError for an unknown sampler or
    option, and where noise is needed and missing.
    """
    chosen = _find(sampler)
    options = options or {}
    for name in options:
        if name not in chosen.defaults:
            allowed = ", ".join(chosen.defaults) or "none"
            raise ValueError(f"option {name!r} is not one of sampler {sampler!r}; it takes: {allowed}")
    if noise is None and needs_noise(sampler, options):
        shape = tuple(state.x.shape)
        raise ValueError(f"sampler {sampler!r} adds noise at every step; give noise of shape {shape}")
    filled = {
        name: options[name] if name in options else now.sigma.new_full(now.sigma.shape, value)
        for name, value in chosen.defaults.items()
    }
    moved = chosen.step(denoise, state, now, next, noise, filled)
    return State(moved.x, {**state.memory, **moved.memory})


def _find(sampler: str) -> Sampler:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose from: {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[sampler]
