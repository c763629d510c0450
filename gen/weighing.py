"""How a network's answers become what a lane's rows believe: guidance, its rules, likeness and thresholding.

It knows one lane's attempt and what was said of its evaluations; it asks no network.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gen.attempt import Attempt, blaming_row
from samplers.guidance import combine, in_interval, rescale
from samplers.scaling import Scaling
from samplers.state import Denoise, Prediction, per_row
from samplers.wrap import score_guided, thresholded


def guided_denoiser(attempt: Attempt, each: Prediction, scaling: Scaling) -> Denoise:
    """The lane's rows as a denoiser, once the network has said this of their M evaluations."""
    plan = attempt.plan

    def guided(x: Tensor, sigma: Tensor) -> Prediction:
        def mixed(values: Tensor, weights: Tensor) -> Tensor:
            return combine(values, weights, plan.spread, len(x))

        weights = plan.weights
        if plan.interval is not None:
            inside = in_interval(sigma, plan.interval)
            weights = torch.where(inside.index_select(0, plan.rows), weights, plan.alone)
        x0 = mixed(each.x0, weights)
        if plan.guides is not None:
            prompt, null, before = mixed(each.x0, plan.alone), mixed(each.x0, 1 - plan.alone), attempt.momentum
            index = attempt.lane.table.step[0].level.index
            ruled, momentum = plan.guides.apply(x0, prompt, null, x, sigma, index, before, scaling)
            held = per_row(in_interval(sigma, plan.interval) & plan.away, x)
            x0 = torch.where(held, ruled, x0)
            if momentum is not None:
                attempt.momentum = torch.where(held, momentum, 0.0 if before is None else before)
        if plan.rescale is not None:
            changed = rescale(x0, mixed(each.x0, plan.alone), x, sigma, plan.rescale, scaling)
            is_changed = (plan.rescale > 0) & in_interval(sigma, plan.interval)
            x0 = torch.where(per_row(is_changed, x0), changed, x0)
        # guidance says where to go; how sure that is, the prompt's evaluation says alone, as in diffusers
        return Prediction(x0, None if each.variance is None else mixed(each.variance, plan.alone))

    denoise: Denoise = _clip_guided(guided, attempt) if plan.clip_guided else guided
    if plan.thresholding is not None:
        percentile, bound = plan.thresholding
        denoise = thresholded(denoise, percentile, bound=bound)
    return denoise


def _clip_guided(guided: Denoise, attempt: Attempt) -> Denoise:
    """Rows with a likeness led up its gradient, within their interval."""
    plan = attempt.plan

    def clip_guided(x: Tensor, sigma: Tensor) -> Prediction:
        prediction, inside = guided(x, sigma), in_interval(sigma, plan.interval)
        x0 = list(prediction.x0.split(1))
        for slot, scale, likeness in plan.clip_guided:  # one by one, for a gradient through a picture takes much memory
            one = slice(slot, slot + 1)
            climb = score_guided(partial(_clean, x0[slot]), likeness, scale * inside[one])
            with blaming_row(attempt.lane, slot):
                x0[slot] = climb(x[one], sigma[one]).x0
        return Prediction(torch.cat(x0), prediction.variance)

    return clip_guided


def _clean(x0: Tensor, x: Tensor, sigma: Tensor) -> Prediction:
    """A denoiser that has spoken."""
    return Prediction(x0)
