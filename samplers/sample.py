"""The samplers by name, and `advance`, the one way a state moves.

There is no loop here: whoever holds the rows (an engine, an example, a test) calls `advance` once a step,
with rows at whatever levels they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from samplers import dpmpp, euler, heun
from samplers.state import Denoise, Level, State

Step = Callable[[Denoise, State, Level, Level, Tensor | None, dict[str, Tensor]], State]


@dataclass(frozen=True)
class Sampler:
    """A step, and what each of its options is where a caller says nothing."""

    step: Step
    defaults: Mapping[str, float]


_DPMPP = {"lower_order_final": 1.0, "euler_at_final": 0.0}  # diffusers' own defaults

SAMPLERS = {
    "ddim": Sampler(euler.step, {"eta": 0.0}),
    "ddpm": Sampler(euler.step, {"eta": 1.0}),
    "dpmpp_2m": Sampler(dpmpp.step, {"eta": 0.0, **_DPMPP}),
    "dpmpp_2m_sde": Sampler(dpmpp.step, {"eta": 1.0, **_DPMPP}),
    "euler": Sampler(euler.step, {"eta": 0.0}),
    "euler_ancestral": Sampler(euler.step, {"eta": 1.0}),
    "heun": Sampler(heun.step, {}),
}


def needs_noise(sampler: str, options: Mapping[str, Tensor] | None = None) -> bool:
    """Whether `advance` has to be given noise: some eta is, or may be, above zero."""
    return "eta" in (options or {}) or _find(sampler).defaults.get("eta", 0.0) > 0


def advance(
    sampler: str,
    denoise: Denoise,
    state: State,
    now: Level,
    next: Level,
    noise: Tensor | None = None,  # (B, ...) unit noise; None where `needs_noise` is False
    options: Mapping[str, Tensor] | None = None,  # (B,) each; None: the sampler's defaults
) -> State:
    """Every row one step on, from its level `now` to its level `next` (below it, or 0).

    Raises ValueError for an unknown sampler or option, and where noise is needed and missing.
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
    return chosen.step(denoise, state, now, next, noise, filled)


def _find(sampler: str) -> Sampler:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; choose from: {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[sampler]
