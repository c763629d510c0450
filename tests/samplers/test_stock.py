"""Each sampler paints what the diffusers scheduler of its name paints, from the same noise and network."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from samplers.scaling import Scaling, denoiser
from samplers.schedule import (
    EXACT_ZERO_SNR_SIGMA,
    exponential,
    flow,
    from_betas,
    karras,
    make_betas,
    spaced_timesteps,
    training_sigmas,
    zero_terminal_snr,
)
from tests.samplers.exact import mixture, pictures, run

SHAPE, SEEDS = (4, 3, 3), [0, 7, 2**32 - 1]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
IN_SIGMA = {"unit_variance": False, "whole": False}
SPACINGS = [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]


def network_of(kind: str, betas: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible network of a mixture, written from alpha_bar and timesteps alone."""
    alpha_bar = (1 - betas).cumprod(0).double().clamp(min=1e-12).numpy()
    log_sigma = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
    denoise = mixture(pictures(5, SHAPE), width=0.3)

    def network(latent: Tensor, timestep: Tensor) -> Tensor:
        at = torch.as_tensor(timestep, dtype=torch.float64).expand(len(latent))
        sigma = torch.from_numpy(np.exp(np.interp(at.numpy(), np.arange(len(log_sigma)), log_sigma)))
        s = sigma.reshape(-1, 1, 1, 1)
        alpha = 1 / (1 + s**2).sqrt()
        z = latent.double()
        x0 = denoise(z / alpha, sigma).x0
        eps = (z - alpha * x0) / (s * alpha)
        return {"eps": eps, "v": alpha * eps - s * alpha * x0, "x0": x0}[kind].float()

    return network


def stock_run(scheduler: object, network: Callable, steps: int, **step_options: float) -> Tensor:
    """What a diffusers pipeline does, with one CPU generator per picture."""
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    noise = torch.stack([torch.randn(SHAPE, generator=rng) for rng in rngs])
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    draws = {} if isinstance(scheduler, HeunDiscreteScheduler) else {"generator": rngs}
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **draws, **step_options).prev_sample
    return x


def assert_same(
    sampler: str,
    kind: str,
    scheduler: object,
    steps: int,
    eta: float | None = None,
    ours: dict | None = None,
    schedule: object = None,
    options: dict[str, float] | None = None,
) -> None:
    network = network_of(kind, scheduler.betas)
    schedule = schedule or from_betas(scheduler.betas, steps, **(ours or {}))
    options = dict(options or {}) | ({} if eta is None else {"eta": eta})
    rows = {name: torch.full((len(SEEDS),), float(value)) for name, value in options.items()}
    denoise = denoiser(network, Scaling.from_betas(kind, scheduler.betas))
    painted = run(sampler, denoise, schedule, SEEDS, SHAPE, rows)
    expected = stock_run(scheduler, network, steps, **({} if eta is None else {"eta": eta}))
    torch.testing.assert_close(painted, expected, atol=1e-4, rtol=1e-4)


def spaced(spacing: str, offset: int) -> dict:
    return {"spacing": spacing, "steps_offset": offset}


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_ddim(kind: str, eta: float, one: bool, spacing: str, offset: int) -> None:
    """Where the steps divide the training steps; elsewhere stock lands beside the level it reads next."""
    told = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": one}
    scheduler = DDIMScheduler(**BETAS, **told, clip_sample=False, prediction_type=PREDICTION[kind])
    assert_same("ddim", kind, scheduler, 10, eta, spaced(spacing, offset) | {"final": "zero" if one else "sigma_min"})


@pytest.mark.parametrize("eta", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_ddim_from_pure_noise(kind: str, eta: float) -> None:
    """Not at eta 1, where stock's own arithmetic takes the root of a negative and is NaN; ours is not."""
    told = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample": False}
    scheduler = DDIMScheduler(**BETAS, **told, prediction_type=PREDICTION[kind])
    assert scheduler.alphas_cumprod[-1] == 0
    assert_same("ddim", kind, scheduler, 20, eta, {"max_sigma": EXACT_ZERO_SNR_SIGMA})


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("steps", [10, 13])
def test_ddpm(kind: str, spacing: str, offset: int, steps: int) -> None:
    told = {"timestep_spacing": spacing, "steps_offset": offset, "variance_type": "fixed_small"}
    scheduler = DDPMScheduler(**BETAS, **told, clip_sample=False, prediction_type=PREDICTION[kind])
    assert_same("ddpm", kind, scheduler, steps, ours=spaced(spacing, offset))


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_euler(kind: str, spacing: str, offset: int, final: str) -> None:
    told = {"timestep_spacing": spacing, "steps_offset": offset, "final_sigmas_type": final}
    scheduler = EulerDiscreteScheduler(**BETAS, **told, prediction_type=PREDICTION[kind])
    assert_same("euler", kind, scheduler, 13, ours=spaced(spacing, offset) | IN_SIGMA | {"final": final})


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_euler_from_clamped_zero_snr(spacing: str) -> None:
    told = {"timestep_spacing": spacing, "rescale_betas_zero_snr": True}
    scheduler = EulerDiscreteScheduler(**BETAS, **told, prediction_type="v_prediction")
    assert_same("euler", "v", scheduler, 10, ours=spaced(spacing, 0) | IN_SIGMA)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing, offset", SPACINGS)
def test_euler_ancestral(kind: str, spacing: str, offset: int) -> None:
    told = {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, **told, prediction_type=PREDICTION[kind])
    assert_same("euler_ancestral", kind, scheduler, 13, ours=spaced(spacing, offset) | IN_SIGMA)


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
def test_heun(kind: str, spacing: str, offset: int) -> None:
    told = {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = HeunDiscreteScheduler(**BETAS, **told, prediction_type=PREDICTION[kind])
    assert_same("heun", kind, scheduler, 9, ours=spaced(spacing, offset) | IN_SIGMA)


DPMPP = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}


@pytest.mark.parametrize("sampler", DPMPP)
@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_dpmpp(sampler: str, kind: str, spacing: str, offset: int, steps: int) -> None:
    told = {"timestep_spacing": spacing, "steps_offset": offset, "algorithm_type": DPMPP[sampler]}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **told, prediction_type=PREDICTION[kind])
    assert_same(sampler, kind, scheduler, steps, ours=spaced(spacing, offset) | {"beyond_last": True})


@pytest.mark.parametrize("sampler", DPMPP)
@pytest.mark.parametrize("steps", [10, 16])
@pytest.mark.parametrize("lower, euler", [(True, False), (False, False), (False, True), (True, True)])
def test_dpmpp_last_step(sampler: str, steps: int, lower: bool, euler: bool) -> None:
    """With a last level above zero the two options decide whether the last step is first-order."""
    options = {"lower_order_final": lower, "euler_at_final": euler}
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, **options, algorithm_type=DPMPP[sampler], final_sigmas_type="sigma_min"
    )
    ours = {"spacing": "linspace", "beyond_last": True, "final": "sigma_min"}
    assert_same(sampler, "eps", scheduler, steps, ours=ours, options=options)


def test_dpmpp_from_clamped_zero_snr() -> None:
    told = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **told, prediction_type="v_prediction")
    assert_same("dpmpp_2m", "v", scheduler, 10, ours={"beyond_last": True})


@pytest.mark.parametrize("sampler, stock", [("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler)])
@pytest.mark.parametrize("option, builder", [("use_karras_sigmas", karras), ("use_exponential_sigmas", exponential)])
def test_respaced_levels(sampler: str, stock: type, option: str, builder: Callable) -> None:
    scheduler = stock(**BETAS, **{option: True}, timestep_spacing="linspace")
    table = training_sigmas(scheduler.betas)
    schedule = builder(12, table[0].item(), table[-1].item(), unit_variance=False)
    assert_same(sampler, "eps", scheduler, 12, schedule=schedule)


@pytest.mark.parametrize("option, builder", [("use_karras_sigmas", karras), ("use_exponential_sigmas", exponential)])
def test_respaced_levels_of_dpmpp(option: str, builder: Callable) -> None:
    """The levels alone: stock tells the network a rounded timestep there, and we the true one."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, **{option: True})
    scheduler.set_timesteps(12)
    table = training_sigmas(scheduler.betas)
    torch.testing.assert_close(builder(12, table[0].item(), table[-1].item()).sigmas.float(), scheduler.sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow(shift: float) -> None:
    """Flow Euler equals sigma Euler: u is the velocity of (1 - t) x0 + t eps, as diffusers steps it."""
    denoise = mixture(pictures(5, SHAPE), width=0.3)

    def network(latent: Tensor, timestep: Tensor) -> Tensor:
        t = (torch.as_tensor(timestep).double() / 1000).expand(len(latent)).clamp(max=1 - 1e-9)
        tt = t.reshape(-1, 1, 1, 1)
        x0 = denoise(latent.double() / (1 - tt), t / (1 - t)).x0
        return ((latent - (1 - tt) * x0) / tt - x0).float()

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    x = torch.stack([torch.randn(SHAPE, generator=rng) for rng in rngs])
    scheduler.set_timesteps(11)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x).prev_sample
    painted = run("euler", denoiser(network, Scaling.flow()), flow(11, shift), SEEDS, SHAPE)
    torch.testing.assert_close(painted, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 20, 30, 48, 50, 64, 80, 128, 333, 999])
@pytest.mark.parametrize("spacing, offset", SPACINGS)
def test_timesteps(steps: int, spacing: str, offset: int) -> None:
    told = {"timestep_spacing": spacing, "steps_offset": offset}
    for stock, ours in [
        (DDIMScheduler, {}),
        (DDPMScheduler, {}),
        (EulerDiscreteScheduler, {"whole": False}),
        (HeunDiscreteScheduler, {"whole": False}),
        (DPMSolverMultistepScheduler, {"beyond_last": True}),
    ]:
        scheduler = stock(**BETAS, **told)
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.double()
        if stock is HeunDiscreteScheduler:  # each but the first is visited twice
            expected = torch.cat([expected[:1], expected[1::2]])
        mine = spaced_timesteps(steps, 1000, spacing=spacing, steps_offset=offset, **ours)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind, stock", [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
@pytest.mark.parametrize("rescale", [False, True])
def test_training_levels(kind: str, stock: str, rescale: bool) -> None:
    betas = make_betas(kind, 1000, 0.0001, 0.02)
    betas = zero_terminal_snr(betas) if rescale else betas
    scheduler = EulerDiscreteScheduler(
        beta_schedule=stock, beta_start=0.0001, beta_end=0.02, rescale_betas_zero_snr=rescale
    )
    torch.testing.assert_close(betas, scheduler.betas, atol=1e-7, rtol=1e-6)
    sigmas = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
    torch.testing.assert_close(training_sigmas(betas), sigmas, atol=0, rtol=1e-3 if kind == "cosine" else 1e-5)
