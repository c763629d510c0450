"""Steps against exact answers: a Gaussian whose path is known, a data set whose best denoiser is."""

import math

import pytest
import torch
from torch import Tensor

from samplers.noise import noise
from samplers.sample import SAMPLERS, advance, needs_noise
from samplers.schedule import Schedule, exponential, from_betas, karras, make_betas
from samplers.state import HISTORY, Prediction, State, start, start_from
from tests.samplers.exact import DEVIATION, MEAN, double, gaussian, gaussian_path, levels, mixture, pictures, run

SHAPE = (2, 3, 3)


def path_error(sampler: str, steps: int) -> float:
    """How far from the Gaussian's true path a run from sigma 5 to 0.1 ends, in float64."""
    schedule = exponential(steps + 1, 0.1, 5.0)
    x = torch.linspace(-10, 10, 7, dtype=torch.float64)[:, None]
    ones = torch.ones(len(x))
    state = State(x, {"x0": torch.zeros_like(x), "sigma": 0.0 * ones.double()} if HISTORY[sampler] else {})
    options = {"eta": 0.0 * ones} if sampler == "dpmpp_2m_sde" else {}
    for index in range(steps):
        now, next = (double(levels(schedule, [i] * len(x)), schedule) for i in (index, index + 1))
        state = advance(sampler, gaussian, state, now, next, torch.zeros_like(x), options)
    exact = gaussian_path(x, 5.0 * ones.double(), 0.1 * ones.double())
    return (state.x - exact).abs().max().item()


@pytest.mark.parametrize(
    "sampler, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_sde", 2)]
)
def test_order_of_convergence(sampler: str, order: int) -> None:
    coarse, fine = path_error(sampler, 80), path_error(sampler, 160)
    assert fine < 0.05
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 400), ("dpmpp_2m_sde", 60)])
def test_stochastic_samplers_reach_the_distribution(sampler: str, steps: int) -> None:
    """20,000 rows of the Gaussian: mean and deviation, known to 0.0035 and 0.0025 (one standard error).

    A first-order sampler falls short of the deviation by a share of the step: 0.463 after 60 steps, not 0.5.
    """
    schedule = karras(steps, 0.02, 40.0)
    rng = torch.Generator().manual_seed(3)
    state = start(sampler, torch.randn(20_000, 1, generator=rng), torch.full((20_000,), schedule.start_scale))
    for index in range(schedule.num_steps):
        now, next = (levels(schedule, [i] * 20_000) for i in (index, index + 1))
        state = advance(sampler, gaussian, state, now, next, torch.randn(20_000, 1, generator=rng))
    assert state.x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert state.x.std().item() == pytest.approx(DEVIATION, abs=0.015)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [karras(20, 0.002, 80.0), from_betas(make_betas(), 20, steps_offset=1)])
def test_every_run_ends_in_the_data_set(sampler: str, schedule: Schedule) -> None:
    """The ideal denoiser knows six pictures; each sampler paints one of them, and not always the same."""
    data = pictures(6, SHAPE)
    painted = run(sampler, mixture(data), schedule, list(range(40)), SHAPE)
    distance = (painted.flatten(1)[:, None] - data.flatten(1)).abs().amax(-1)
    nearest, which = distance.min(1)
    assert nearest.max() < 1e-3
    assert len(which.unique()) > 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_to_zero_is_the_estimate(sampler: str) -> None:
    schedule = Schedule(torch.tensor([3.0, 0.0], dtype=torch.float64), start_scale=3.0)
    state = start(sampler, noise([1, 2], "decoder", 0, SHAPE), torch.full((2,), 3.0))
    moved = advance(
        sampler, gaussian, state, levels(schedule, [0, 0]), levels(schedule, [1, 1]), torch.randn(2, *SHAPE)
    )
    torch.testing.assert_close(moved.x, gaussian(state.x, torch.full((2,), 3.0)).x0)


def test_ddim_equals_euler() -> None:
    """Song et al. 2021a, equation 13: DDIM as its paper writes it, in alpha_bar, beside Euler on the ODE."""
    alpha_bar = (1 - make_betas()).cumprod(0).double()
    schedule = from_betas(make_betas(), 8, spacing="leading")
    denoise = mixture(pictures(4, SHAPE), width=0.2)
    z = noise([5, 6], "decoder", 0, SHAPE).double()
    for t in range(875, -1, -125):
        a, a_next = alpha_bar[t], alpha_bar[t - 125] if t else torch.tensor(1.0)
        sigma = ((1 - a) / a).sqrt().expand(2)
        x0 = denoise(z / a.sqrt(), sigma).x0
        eps = (z - a.sqrt() * x0) / (1 - a).sqrt()
        z = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    for sampler in ("ddim", "euler"):
        painted = run(sampler, denoise, schedule, [5, 6], SHAPE)
        torch.testing.assert_close(painted, z.float(), atol=1e-5, rtol=1e-5)


def test_eta_one_is_ancestral_and_between_is_neither() -> None:
    schedule, denoise = karras(9, 0.03, 14.0), mixture(pictures(4, SHAPE), width=0.2)
    ancestral = run("euler_ancestral", denoise, schedule, [1, 2], SHAPE)
    torch.testing.assert_close(run("euler", denoise, schedule, [1, 2], SHAPE, {"eta": torch.ones(2)}), ancestral)
    torch.testing.assert_close(run("ddpm", denoise, schedule, [1, 2], SHAPE), ancestral)
    mixed = run("euler", denoise, schedule, [1, 2], SHAPE, {"eta": torch.tensor([1.0, 0.5])})
    torch.testing.assert_close(mixed[0], ancestral[0])
    assert (mixed[1] - ancestral[1]).abs().max() > 1e-3


def test_img2img_follows_the_path_from_its_level() -> None:
    """A run from the middle has no past: the multistep sampler takes its first step alone and stays close."""
    schedule = exponential(61, 0.1, 5.0)
    begun = torch.full((3,), 1.0)
    index = (schedule.sigmas > 1.0).sum().item()
    x0, eps = MEAN + DEVIATION * torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    sigma = schedule.level(torch.full((3,), index)).sigma
    assert sigma[0] == pytest.approx(begun[0].item(), rel=0.1)
    for sampler in ("dpmpp_2m", "heun"):
        state = start_from(sampler, x0, eps, sigma)
        torch.testing.assert_close(state.x, x0 + sigma[0] * eps)
        for i in range(index, 60):
            state = advance(sampler, gaussian, state, levels(schedule, [i] * 3), levels(schedule, [i + 1] * 3))
        exact = gaussian_path(x0 + sigma[0] * eps, sigma, torch.full((3,), 0.1))
        torch.testing.assert_close(state.x, exact, atol=2e-3, rtol=0)


def test_heun_asks_twice_and_never_at_zero() -> None:
    asked: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor) -> Prediction:
        asked.append(sigma)
        return gaussian(x, sigma)

    schedule = karras(4, 0.1, 5.0)
    state = start("heun", torch.randn(2, *SHAPE), torch.full((2,), 5.0))
    moved = advance("heun", watched, state, levels(schedule, [0, 3]), levels(schedule, [1, 4]))
    assert len(asked) == 2 and all((sigma > 0).all() for sigma in asked)
    assert moved.x.isfinite().all()


def test_names_options_and_noise_are_checked() -> None:
    schedule = karras(4, 0.1, 5.0)
    now, next = levels(schedule, [0]), levels(schedule, [1])
    state = start("euler", torch.randn(1, *SHAPE), torch.full((1,), 5.0))
    with pytest.raises(ValueError, match="sampler 'eular' is unknown; choose from: ddim, ddpm, dpmpp_2m"):
        advance("eular", gaussian, state, now, next)
    with pytest.raises(ValueError, match="sampler 'eular' is unknown; choose from: ddim"):
        start("eular", state.x, torch.ones(1))
    with pytest.raises(ValueError, match="option 'churn' is not one of sampler 'euler'; it takes: eta"):
        advance("euler", gaussian, state, now, next, options={"churn": torch.ones(1)})
    with pytest.raises(ValueError, match="adds noise at every step; give noise of shape"):
        advance("ddpm", gaussian, state, now, next)
    with pytest.raises(ValueError, match="adds noise"):
        advance("euler", gaussian, state, now, next, options={"eta": torch.ones(1)})
    assert [name for name in SAMPLERS if needs_noise(name)] == ["ddpm", "dpmpp_2m_sde", "euler_ancestral"]
    assert HISTORY.keys() == SAMPLERS.keys()
