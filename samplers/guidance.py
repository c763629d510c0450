"""Guidance: estimates under several conditions, weighted into one per row.

Pure functions of what the denoiser returned; they know neither networks nor prompts. A row's weights sum to
one, so linear guidance on x0 is the same guidance on eps, v or a flow. A `Guide` says by which rule a row is guided,
and `Guides.apply` follows the rules of many rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.scaling import Scaling
from samplers.state import per_row

FEW_VALUES = 1 << 17  # of all rows, 1 MB of places


def combine(x0: Tensor, weights: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Each row's weighted sum of M evaluations: (M, ...), weights (M,), rows (M,) -> (num_rows, ...).

    Whoever asks again and again for the same rows gives them as `spread`, (M, values of each).
    """
    weighted = (x0.float() * per_row(weights.float(), x0)).flatten(1)
    places = rows if rows.ndim == 2 else spread(rows, weighted.shape[1])
    assert places.shape == weighted.shape, "a place for each value, or scatter_add would leave some out"
    summed = weighted.new_zeros(num_rows, weighted.shape[1]).scatter_add_(0, places, weighted)
    return summed.view(num_rows, *x0.shape[1:])


def spread(rows: Tensor, num_values: int) -> Tensor:
    """The rows (M,) of evaluations for each of their values, (M, num_values), as `combine` takes them.

    By index_add, or by places that are not laid out, a thread per core is woken for the smallest rows, which takes
    milliseconds on some machines; where rows are large the places are a view.
    """
    places = rows[:, None].expand(-1, num_values)
    return places.contiguous() if places.numel() <= FEW_VALUES else places


def cfg_terms(scale: float) -> dict[str, float]:
    """Classifier-free guidance as weights of conditions (Ho & Salimans 2022); 1 is off and needs no null.

    `scale` is diffusers' guidance_scale, 1 + w of the paper. A negative prompt takes the place of the null; in
    autoguidance (Karras et al. 2024) what a weaker network says of the prompt does.
    """
    return {"prompt": 1.0} if scale == 1 else {"null": 1.0 - scale, "prompt": scale}


def in_interval(sigma: Tensor, interval: tuple[float | Tensor, float | Tensor] | None) -> Tensor:
    """Where guidance holds, (B,) bool: low < sigma <= high (Kynkäänniemi et al. 2024); None: everywhere.

    The ends are numbers, or (B,) for each row its own.
    """
    if interval is None:
        return torch.ones_like(sigma, dtype=torch.bool)
    low, high = interval
    return (low < sigma) & (sigma <= high)


def rescale(guided: Tensor, prompt: Tensor, x: Tensor, sigma: Tensor, factor: Tensor, scaling: Scaling) -> Tensor:
    """Give guided (B, ...) the contrast it has under the prompt alone: Lin et al. 2024, section 3.4.

    The rule is one of the network's raw output, so the estimates of x0 go there and back. factor (B,) is
    diffusers' guidance_rescale, in [0, 1]; 0 is off.
    """
    output, reference = scaling.output(guided, x, sigma), scaling.output(prompt, x, sigma)
    axes = list(range(1, x.ndim))
    contrast = reference.std(axes, keepdim=True) / output.std(axes, keepdim=True)
    return scaling.x0(torch.lerp(output, output * contrast, per_row(factor, x)), x, sigma)


def zero_star(prompt: Tensor, null: Tensor, x: Tensor, sigma: Tensor, scale: Tensor, scaling: Scaling) -> Tensor:
    """CFG-Zero*: guidance away from the null's raw output, shrunk to lie nearest the prompt's (Fan et al. 2025).

    Estimates of x0 (B, ...) in and out; scale (B,) is diffusers' guidance_scale, 1 is off.
    """
    away, output = scaling.output(null, x, sigma), scaling.output(prompt, x, sigma)
    nearest = per_row(_dot(output, away) / _dot(away, away).clamp(min=1e-8), x)
    return scaling.x0(torch.lerp(nearest * away, output, per_row(scale, x)), x, sigma)


def zero_init(guided: Tensor, x: Tensor, sigma: Tensor, still: Tensor, scaling: Scaling) -> Tensor:
    """The zero-init of CFG-Zero*: rows in `still` (B,) bool, at their first steps, stay where they are.

    The raw output is 0 there (Fan et al. 2025), which is standing still where that is a flow's velocity.
    """
    return torch.where(per_row(still, x), scaling.x0(torch.zeros_like(x), x, sigma), guided)


@dataclass(frozen=True)
class Projection:
    """How `project` changes guidance, each (B,); the paper's settings for Stable Diffusion XL beside them."""

    parallel: Tensor  # how much stays of the part along the prompt's estimate, eta: 0; 1 keeps all
    limit: Tensor  # the largest norm of the difference, r: 15; inf is off
    momentum: Tensor  # what the differences of earlier calls count, beta: -0.5; 0 is off


def project(prompt: Tensor, null: Tensor, before: Tensor, scale: Tensor, how: Projection) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance: Sadat et al. 2024 (APG), which lets large scales saturate less.

    Estimates of x0 (B, ...) in and out; scale (B,) is diffusers' guidance_scale, 1 is off. The second value is the
    running difference, which the next call is to be given as `before`. It is zeros at a row's beginning and is kept
    with the row: `state.remember(momentum=...)`.
    """
    running = prompt - null + per_row(how.momentum, prompt) * before
    norm = _dot(running, running).clamp(min=1e-24).sqrt()  # clamped first, or the slope of a root at 0 is no number
    held = running * per_row((how.limit / norm).clamp(max=1), prompt)
    along = per_row(_dot(held, prompt) / _dot(prompt, prompt).clamp(min=1e-12), prompt) * prompt
    across = held - along
    return prompt + per_row(scale - 1, prompt) * (across + per_row(how.parallel, prompt) * along), running


RULES = {
    "cfg": "classifier-free guidance: Ho & Salimans 2022",
    "cfg_zero": "CFG-Zero*: Fan et al. 2025, see `zero_star`",
    "apg": "adaptive projected guidance: Sadat et al. 2024, see `project`",
    "autoguidance": "away from what a weaker network says of the prompt: Karras et al. 2024, see `cfg_terms`",
}


@dataclass(frozen=True, kw_only=True)
class Guide:
    """By which rule a row is guided and what that rule takes; its guidance scale is told apart from this."""

    rule: str = "cfg"  # one of `RULES`
    zero_init_steps: int = 0  # cfg_zero: first steps that `zero_init` stands still in
    apg_eta: float = 0.0  # apg: `Projection.parallel`
    apg_norm_threshold: float = 15.0  # apg: `Projection.limit`
    apg_momentum: float = -0.5  # apg: `Projection.momentum`


@dataclass(frozen=True)
class Guides:
    """The guides of B rows; what is None, none of them follows."""

    scale: Tensor  # (B,)
    zero: Tensor | None  # (B,) bool, the rows of cfg_zero
    still: Tensor  # (B,) their first steps that stand still
    apg: Tensor | None  # (B,) bool, the rows of apg
    how: Projection

    @classmethod
    def of(cls, guides: Sequence[tuple[Guide, float]], move: Callable[[Tensor], Tensor]) -> Guides | None:
        """Each row's guide and guidance scale, put on the device by `move`; None where all rows follow cfg."""

        def rows_of(rule: str) -> Tensor | None:
            found = [guide.rule == rule for guide, _ in guides]
            return move(torch.tensor(found)) if any(found) else None

        zero, apg = rows_of("cfg_zero"), rows_of("apg")
        if zero is None and apg is None:
            return None
        rows = [
            (scale, one.zero_init_steps, one.apg_eta, one.apg_norm_threshold, one.apg_momentum) for one, scale in guides
        ]
        scale, still, parallel, limit, momentum = move(torch.tensor(rows, dtype=torch.float32)).unbind(1)
        return cls(scale, zero, still, apg, Projection(parallel, limit, momentum))

    def apply(
        self,
        guided: Tensor,  # (B, ...) estimates of x0 by cfg
        prompt: Tensor,  # (B, ...)
        null: Tensor,  # (B, ...); anything where a row is not guided, which the caller leaves out
        x: Tensor,
        sigma: Tensor,  # (B,)
        index: Tensor,  # (B,) steps taken
        before: Tensor | None,  # (B, ...) running differences; None: none of these rows has one yet
        scaling: Scaling,
    ) -> tuple[Tensor, Tensor | None]:
        """Each row's estimate by its own rule, and its running difference where a row follows apg (else `before`)."""
        if self.zero is not None:
            moved = zero_star(prompt, null, x, sigma, self.scale, scaling)
            moved = zero_init(moved, x, sigma, index < self.still, scaling)
            guided = torch.where(per_row(self.zero, x), moved, guided)
        if self.apg is None:
            return guided, before
        before = torch.zeros_like(x) if before is None else before
        projected, running = project(prompt, null, before, self.scale, self.how)
        rows = per_row(self.apg, x)
        return torch.where(rows, projected, guided), torch.where(rows, running.detach(), before)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each row with its other, (B,)."""
    return (one * other).flatten(1).sum(1)
