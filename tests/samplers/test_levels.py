"""What `NoiseLevels` reads from a stock scheduler: the levels its class visits, and its options."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from gen.scheduler import CLASSES, STOCK, NoiseLevels
from peers import SPACINGS, stock_of
from samplers.sample import SAMPLERS
from samplers.schedule import Spacing, lcm_timesteps, spaced_timesteps, training_sigmas

TWICE = ("dpm_2", "dpm_2_ancestral", "heun")  # stock lists the levels between, or each level twice


def visited(stock: SchedulerMixin, sampler: str) -> torch.Tensor:
    """The levels that a stock scheduler whose timesteps are set goes through."""
    if not hasattr(stock, "sigmas"):
        table, last = training_sigmas(stock.betas), 0.0
        if stock.config.get("set_alpha_to_one") is False and sampler != "lcm":
            last = table[0].item()
        return torch.cat([table[stock.timesteps.long()], torch.tensor([last])])
    sigmas = stock.sigmas.double()
    return torch.cat([sigmas[:1], sigmas[1::2]])[: stock.num_inference_steps + 1] if sampler in TWICE else sigmas


@pytest.mark.parametrize("beyond_last", [False, True])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), *SPACINGS.items()])
def test_every_step_has_a_timestep_of_its_own(spacing: Spacing, offset: int, beyond_last: bool) -> None:
    """Two levels alike divide by zero in samplers of several steps."""
    options: dict[str, Any] = {"spacing": spacing, "steps_offset": offset, "beyond_last": beyond_last}
    most = 20 - offset - (beyond_last and spacing != "trailing")
    for steps in range(1, most + 1):
        timesteps = spaced_timesteps(steps, 20, **options)
        assert len(timesteps) == steps and (timesteps.diff() < 0).all() and 0 <= timesteps.min() <= timesteps.max() < 20
    with pytest.raises(ValueError, match=f"{most + 1} steps cannot be taken by {spacing} timesteps; give 1 to {most}$"):
        spaced_timesteps(most + 1, 20, **options)


@pytest.mark.parametrize("sampler", STOCK)
@pytest.mark.parametrize("spacing, offset", SPACINGS.items())
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("respaced", [None, "use_karras_sigmas", "use_exponential_sigmas"])
def test_levels_are_those_the_class_visits(
    sampler: str, spacing: str, offset: int, final: str, respaced: str | None
) -> None:
    config: dict[str, Any] = {"timestep_spacing": spacing, "steps_offset": offset, "final_sigmas_type": final}
    config |= {"set_alpha_to_one": final == "zero", **({respaced: True} if respaced else {})}
    stock = stock_of(sampler, **config)
    levels = NoiseLevels.of(stock, "here")
    for steps in (7, 48):
        stock.set_timesteps(steps)
        schedule = levels.schedule(sampler, steps)
        torch.testing.assert_close(schedule.sigmas, visited(stock, sampler), rtol=3e-4, atol=0)
        if sampler not in TWICE:
            assert schedule.num_steps == len(stock.timesteps)
        first = schedule.start_scale / float(stock.init_noise_sigma)
        held = math.hypot(1, schedule.sigmas[0]) if CLASSES[STOCK[sampler][0]].unit_variance else 1.0
        assert first == pytest.approx(held, rel=1e-5)


def test_every_sampler_has_a_class_and_every_class_a_sampler() -> None:
    assert STOCK.keys() == SAMPLERS.keys()
    assert {name for name, _ in STOCK.values()} == CLASSES.keys()


@pytest.mark.parametrize("sampler", STOCK)
def test_another_sampler_visits_the_checkpoints_own_levels(sampler: str) -> None:
    """Also where its stock class would forget that the betas were rescaled, as half of them do."""
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample": False}
    levels = NoiseLevels.of(DDIMScheduler(**config, set_alpha_to_one=False), "here")
    sigmas = levels.schedule(sampler, 10).sigmas
    assert sigmas[0] == (1e6 if CLASSES[STOCK[sampler][0]].max_sigma == 1e6 else 4096)
    # of DDIM's options only its own kind listens to set_alpha_to_one
    low = sampler in ("ddim", "pndm", "deis")
    assert sigmas[-1] == (levels.scaling.sigmas[0] if low else 0)


OPTIONS = [
    (UniPCMultistepScheduler(), {"solver_order": 2, "bh1": 0, "lower_order_final": 1}),
    (
        UniPCMultistepScheduler(solver_type="bh1", solver_order=3, lower_order_final=False),
        {"solver_order": 3, "bh1": 1, "lower_order_final": 0},
    ),
    (DEISMultistepScheduler(solver_order=3), {"solver_order": 3, "lower_order_final": 1}),
    (DPMSolverMultistepScheduler(euler_at_final=True), {"lower_order_final": 1, "euler_at_final": 1}),
    (DPMSolverSinglestepScheduler(lower_order_final=True), {"lower_order_final": 1}),
    (UnCLIPScheduler(), {"clip": 1, "learned": 0}),
    (UnCLIPScheduler(clip_sample_range=5), {"clip": 5, "learned": 0}),
    (UnCLIPScheduler(clip_sample=False, variance_type="learned_range"), {"clip": math.inf, "learned": 1}),
    (DDPMScheduler(clip_sample=False), {"clip": math.inf, "learned": 0}),
    (DDPMScheduler(clip_sample=False, variance_type="learned_range"), {"clip": math.inf, "learned": 1}),
    (DDIMScheduler(), {"clip": 1}),
    (LCMScheduler(), {"clip": math.inf}),
]


@pytest.mark.parametrize("stock, options", OPTIONS)
def test_options_are_the_configurations(stock: SchedulerMixin, options: dict[str, float]) -> None:
    levels = NoiseLevels.of(stock, "here")
    assert levels.options(levels.sampler) == options
    assert options.keys() <= SAMPLERS[levels.sampler].defaults.keys()


@pytest.mark.parametrize(
    "stock, message",
    [
        (PNDMScheduler(), r"here: scheduler PNDMScheduler\(skip_prk_steps=False\) is not supported; choose from: DDIM"),
        (
            DPMSolverMultistepScheduler(solver_order=1),
            r"solver_order=1\) is not supported; choose from: .*solver_order=2",
        ),
        (DPMSolverSinglestepScheduler(solver_order=3), r"solver_order=3\) is not supported"),
        (DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++"), "'sde-dpmsolver.*is not supported"),
        (
            DPMSolverMultistepScheduler(solver_type="heun"),
            "solver_type='heun' is not supported; choose from: 'midpoint'",
        ),
        (DPMSolverMultistepScheduler(lambda_min_clipped=-5.1), "lambda_min_clipped=-5.1 is not supported"),
        (UniPCMultistepScheduler(predict_x0=False), "predict_x0=False is not supported; choose from: True"),
        (
            UniPCMultistepScheduler(disable_corrector=[0]),
            r"disable_corrector=\[0\] is not supported; choose from: \[\]",
        ),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "prediction_type='flow_prediction' is not"),
        (LCMScheduler(timestep_scaling=1.0), "timestep_scaling=1.0 is not supported; choose from: 10.0"),
        (HeunDiscreteScheduler(clip_sample=True), "clip_sample=True is not supported"),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large"), "variance_type='fixed_large' is not"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(stock: SchedulerMixin, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseLevels.of(stock, "here")


def test_only_a_learned_range_has_a_second_half() -> None:
    assert NoiseLevels.of(UnCLIPScheduler(variance_type="learned_range"), "here").scaling.learned_range
    assert not NoiseLevels.of(UnCLIPScheduler(), "here").scaling.learned_range


@pytest.mark.parametrize("steps", [0, 51])
def test_lcm_takes_no_more_steps_than_were_distilled(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps cannot be taken; give 1 to 50"):
        lcm_timesteps(steps)
