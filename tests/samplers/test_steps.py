"""Steps against exact answers: a Gaussian whose path is known, a data set whose best denoiser is."""

import math

import pytest
import torch
from torch import Tensor

from samplers.noise import noise
from samplers.sample import SAMPLERS, advance, needs_noise, start, start_from
from samplers.schedule import Schedule, exponential, from_betas, karras, make_betas, zero_terminal_snr
from samplers.state import Denoise, Prediction, State
from tests.samplers.exact import DEVIATION, MEAN, double, gaussian, gaussian_path, levels, mixture, pictures, run

SHAPE = (2, 3, 3)


def path_error(sampler: str, steps: int, values: dict[str, float], schedule: Schedule) -> float:
    """How far from the Gaussian's true path a run to level `steps` ends, in float64, given a true past."""
    x = torch.linspace(-10, 10, 7, dtype=torch.float64)[:, None]
    state, first = SAMPLERS[sampler].begin(x), schedule.sigmas[:1].expand(len(x))
    options = {name: torch.full((len(x),), value) for name, value in values.items()}
    for index in range(steps):
        now, next = (double(levels(schedule, [i] * len(x)), schedule) for i in (index, index + 1))
        state = advance(sampler, gaussian, state, now, next, torch.zeros_like(x), options)
        if index < SAMPLERS[sampler].past:  # the first steps are of a lower order, which would be all one sees
            state = State(gaussian_path(x, first, next.sigma), state.memory)
    return (state.x - gaussian_path(x, first, next.sigma)).abs().max().item()


ORDERS = [
    ("euler", {}, 1),
    ("ddim", {}, 1),
    ("lcm", {"eta": 0.0}, 1),
    ("unclip", {"eta": 0.0}, 1),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    ("dpm_2_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_3m", {}, 3),
    ("dpmpp_3m_sde", {"eta": 0.0}, 3),
    ("deis", {"solver_order": 1.0}, 1),
    ("deis", {"solver_order": 2.0}, 2),
    ("deis", {"solver_order": 3.0}, 3),
    ("lms", {}, 4),
    ("pndm", {}, 2),  # on levels that are not even; Liu et al. 2022 prove as much
    ("unipc", {"solver_order": 1.0, "lower_order_final": 0.0}, 2),  # the corrector raises each by one
    ("unipc", {"solver_order": 2.0, "lower_order_final": 0.0}, 3),
    ("unipc", {"solver_order": 3.0, "lower_order_final": 0.0}, 4),
    ("unipc", {"solver_order": 2.0, "lower_order_final": 0.0, "bh1": 1.0}, 3),
]


@pytest.mark.parametrize("sampler, options, order", ORDERS)
def test_order_of_convergence(sampler: str, options: dict[str, float], order: int) -> None:
    coarse, fine = (path_error(sampler, steps, options, exponential(steps + 1, 0.1, 5.0)) for steps in (80, 160))
    assert fine < 0.05
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert {name for name, _, _ in ORDERS} == SAMPLERS.keys() - {"ddpm", "euler_ancestral"}  # which are ddim


def test_pndm_is_fourth_order_where_levels_are_even() -> None:
    errors = []
    for steps in (160, 320):
        sigmas = torch.cat([torch.linspace(5, 0.5, steps + 1, dtype=torch.float64), torch.zeros(1)])
        errors.append(path_error("pndm", steps, {}, Schedule(sigmas, start_scale=5.0)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2)


def test_a_level_that_comes_twice_makes_pndms_first_step_second_order() -> None:
    """The Euler step and the same step again with the mean slope: Heun's method over two calls."""
    sigmas = torch.tensor([5.0, 4.0, 4.0, 3.5], dtype=torch.float64)
    schedule = Schedule(sigmas, start_scale=5.0)
    x = torch.linspace(-10, 10, 7)[:, None]
    state = SAMPLERS["pndm"].begin(x)
    now, middle, again = (levels(schedule, [index] * 7) for index in (0, 1, 2))
    euler = advance("pndm", gaussian, state, now, middle)
    corrected = advance("pndm", gaussian, euler, middle, again)
    heun = advance("heun", gaussian, State(x), now, middle)
    torch.testing.assert_close(corrected.x, heun.x)
    assert torch.equal(corrected.memory["past"], euler.memory["past"])  # the guess's slope is not remembered
    fresh = advance("pndm", gaussian, state, middle, again)  # a run from there: nothing to take again
    assert torch.equal(fresh.x, x) and not fresh.memory["sigma"].any()


@pytest.mark.parametrize(
    "sampler, steps, options",
    [
        ("ddpm", 400, {}),
        ("dpm_2_ancestral", 100, {}),
        ("dpmpp_2m_sde", 60, {}),
        ("dpmpp_3m_sde", 60, {}),
        ("heun", 60, {"s_churn": 40.0}),
        ("heun", 60, {"s_churn": 40.0, "s_tmin": 0.1, "s_tmax": 10.0}),
    ],
)
def test_stochastic_samplers_reach_the_distribution(sampler: str, steps: int, options: dict[str, float]) -> None:
    """20,000 rows of the Gaussian: mean and deviation, known to 0.0035 and 0.0025 (one standard error).

    A first-order sampler falls short of the deviation by a share of the step: 0.463 after 60 steps, not 0.5.
    """
    assert_distribution(sampler, steps, gaussian, options)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_sampling_is_exact_in_any_number_of_steps(steps: int, eta: float) -> None:
    """Of a network that jumps to the end of its path. With some noise left there, eta takes part of it."""

    def jump(x: Tensor, sigma: Tensor) -> Prediction:
        return Prediction(gaussian_path(x, sigma, torch.zeros_like(sigma)))

    if eta == 1 or steps == 1:
        assert_distribution("lcm", steps, jump, {"eta": eta})
    schedule = karras(steps, 0.02, 40.0)
    x, noise = torch.randn(4, 1), torch.randn(4, 1)
    now, next = levels(schedule, [0] * 4), levels(schedule, [1] * 4)
    moved = advance("lcm", jump, State(x), now, next, noise, {"eta": torch.full((4,), eta)})
    x0 = jump(x, now.sigma).x0
    kept = (x - x0) / now.sigma[:, None]
    torch.testing.assert_close(moved.x, x0 + next.sigma[:, None] * ((1 - eta**2) ** 0.5 * kept + eta * noise))


def assert_distribution(sampler: str, steps: int, denoise: Denoise, values: dict[str, float]) -> None:
    schedule = karras(steps, 0.02, 40.0)
    rng = torch.Generator().manual_seed(3)
    options = {name: torch.full((20_000,), value) for name, value in values.items()}
    state = start(sampler, torch.randn(20_000, 1, generator=rng), torch.full((20_000,), schedule.start_scale))
    for index in range(schedule.num_steps):
        now, next = (schedule.level(torch.full((20_000,), i)) for i in (index, index + 1))
        state = advance(sampler, denoise, state, now, next, torch.randn(20_000, 1, generator=rng), options)
    assert state.x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert state.x.std().item() == pytest.approx(DEVIATION, abs=0.015)


PURE = zero_terminal_snr(make_betas())  # its first level is without signal: 4096 and 1e6 stand for it
RUNS = {
    "karras": karras(20, 0.002, 80.0),
    "leading": from_betas(make_betas(), 20, spacing="leading", steps_offset=1),
    "pure noise": from_betas(PURE, 20),
    "purer noise": from_betas(PURE, 20, max_sigma=1e6),
}


LANDING = [(sampler, kind) for sampler in SAMPLERS for kind in RUNS if (sampler, kind) != ("pndm", "karras")]


@pytest.mark.parametrize("sampler, kind", LANDING)
def test_every_run_ends_in_the_data_set(sampler: str, kind: str) -> None:
    """The ideal denoiser knows six pictures; each sampler paints one of them, and not always the same.

    LMS and PNDM draw out the slopes of the last levels to 0, as stock does, where the others take the estimate:
    most of their rows land. PNDM's weights are for levels that are nearly even, which Karras' are not.
    """
    data = pictures(6, SHAPE)
    painted = run(sampler, mixture(data), RUNS[kind], list(range(40)), SHAPE)
    distance = (painted.flatten(1)[:, None] - data.flatten(1)).abs().amax(-1)
    nearest, which = distance.min(1)
    assert nearest.quantile(0.6 if sampler in ("lms", "pndm") else 1.0) < 1e-3
    assert nearest.max() < 0.2
    assert len(which.unique()) > 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_to_zero_is_the_estimate(sampler: str) -> None:
    schedule = Schedule(torch.tensor([3.0, 0.0], dtype=torch.float64), start_scale=3.0)
    state = start(sampler, noise([1, 2], "decoder", 0, SHAPE), torch.full((2,), 3.0))
    moved = advance(
        sampler, gaussian, state, levels(schedule, [0, 0]), levels(schedule, [1, 1]), torch.randn(2, *SHAPE)
    )
    torch.testing.assert_close(moved.x, gaussian(state.x, torch.full((2,), 3.0)).x0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_says_where_it_asks_again(sampler: str) -> None:
    schedule = Schedule(torch.tensor([3.0, 2.0, 1.2, 0.0], dtype=torch.float64), start_scale=3.0)
    state, asked = start(sampler, torch.randn(1, *SHAPE), torch.full((1,), 3.0)), []

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        asked.append(sigma.item())
        return gaussian(x, sigma)

    for index in range(3):
        now, next = levels(schedule, [index]), levels(schedule, [index + 1])
        state = advance(sampler, denoise, state, now, next, torch.randn(1, *SHAPE))
    known = SAMPLERS[sampler]
    expected = []
    for now, next in ((3.0, 2.0), (2.0, 1.2), (1.2, 0.0)):
        expected += [now] if known.again is None else [now, known.again(now, next, known.defaults)]
    assert asked == pytest.approx(expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_to_the_same_level_stays_there(sampler: str) -> None:
    """As the last of diffusers' Karras levels does where sigma_min ends them.

    UniPC and the second of a pair of single steps make use of the call, to take the step before again.
    """
    schedule = Schedule(torch.tensor([3.0, 2.0, 1.2, 0.7, 0.7], dtype=torch.float64), start_scale=3.0)
    state, options = start(sampler, torch.randn(2, *SHAPE), torch.full((2,), 3.0)), {}
    if "eta" in SAMPLERS[sampler].defaults:
        options = {"eta": torch.zeros(2)}
    for index in range(4):
        before = state
        now, next = levels(schedule, [index] * 2), levels(schedule, [index + 1] * 2)
        state = advance(sampler, gaussian, state, now, next, torch.randn(2, *SHAPE), options)
    assert (state.x - before.x).abs().max() < (0.1 if sampler in ("unipc", "dpmpp_2s") else 1e-6)


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
    torch.testing.assert_close(run("unclip", denoise, schedule, [1, 2], SHAPE), ancestral)
    mixed = run("euler", denoise, schedule, [1, 2], SHAPE, {"eta": torch.tensor([1.0, 0.5])})
    torch.testing.assert_close(mixed[0], ancestral[0])
    assert (mixed[1] - ancestral[1]).abs().max() > 1e-3


def test_img2img_follows_the_path_from_its_level() -> None:
    """A run from the middle has no past: the multistep sampler takes its first step alone and stays close."""
    schedule = exponential(61, 0.1, 5.0)
    begun = torch.full((3,), 1.0)
    index = (schedule.sigmas > 1.0).sum().item()
    rng = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, *SHAPE, generator=rng) for _ in range(2))
    x0 = MEAN + DEVIATION * x0
    sigma = schedule.level(torch.full((3,), index)).sigma
    assert sigma[0] == pytest.approx(begun[0].item(), rel=0.1)
    for sampler in ("deis", "dpm_2", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "heun", "lms", "pndm", "unipc"):
        state = start_from(sampler, x0, eps, sigma)
        torch.testing.assert_close(state.x, x0 + sigma[0] * eps)
        for i in range(index, 60):
            state = advance(sampler, gaussian, state, levels(schedule, [i] * 3), levels(schedule, [i + 1] * 3))
        exact = gaussian_path(x0 + sigma[0] * eps, sigma, torch.full((3,), 0.1))
        torch.testing.assert_close(state.x, exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpm_2_ancestral"])
def test_some_ask_twice_and_never_at_zero(sampler: str) -> None:
    asked: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor) -> Prediction:
        asked.append(sigma)
        return gaussian(x, sigma)

    schedule = karras(4, 0.1, 5.0)
    state = start(sampler, torch.randn(2, *SHAPE), torch.full((2,), 5.0))
    unit = torch.randn(2, *SHAPE)
    moved = advance(sampler, watched, state, levels(schedule, [0, 3]), levels(schedule, [1, 4]), unit)
    assert len(asked) == 2 and all((sigma > 0).all() for sigma in asked)
    assert moved.x.isfinite().all()


def test_names_options_and_noise_are_checked() -> None:
    schedule = karras(4, 0.1, 5.0)
    now, next = levels(schedule, [0]), levels(schedule, [1])
    state = start("euler", torch.randn(1, *SHAPE), torch.full((1,), 5.0))
    with pytest.raises(ValueError, match="sampler 'eular' is unknown; choose from: ddim, ddpm, deis, dpm_2"):
        advance("eular", gaussian, state, now, next)
    with pytest.raises(ValueError, match="sampler 'eular' is unknown; choose from: ddim"):
        start("eular", state.x, torch.ones(1))
    with pytest.raises(ValueError, match="option 'churn' is not one of sampler 'euler'; it takes: eta, s_churn, "):
        advance("euler", gaussian, state, now, next, options={"churn": torch.ones(1)})
    with pytest.raises(ValueError, match="adds noise at every step; give noise of shape"):
        advance("ddpm", gaussian, state, now, next)
    with pytest.raises(ValueError, match="adds noise"):
        advance("euler", gaussian, state, now, next, options={"eta": torch.ones(1)})
    noisy = ["ddpm", "dpm_2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler_ancestral", "lcm", "unclip"]
    assert [name for name in SAMPLERS if needs_noise(name)] == noisy
    assert needs_noise("heun", {"s_churn": torch.ones(1)}) and not needs_noise("heun", {"s_tmin": torch.ones(1)})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_row_remembers_is_declared(sampler: str) -> None:
    """The memory of a fresh row has the names and shapes of one under way; what is not the sampler's goes along."""
    schedule = karras(4, 0.1, 5.0)
    begun = start(sampler, torch.randn(3, *SHAPE), torch.full((3,), 5.0))
    now, next, drawn = levels(schedule, [0] * 3), levels(schedule, [1] * 3), torch.randn(3, *SHAPE)
    own = advance(sampler, gaussian, begun, now, next, drawn)
    assert {name: value.shape for name, value in own.memory.items()} == {
        name: value.shape for name, value in begun.memory.items()
    }
    momentum = torch.randn(3, *SHAPE)
    more = advance(sampler, gaussian, begun.remember(momentum=momentum), now, next, drawn)
    assert torch.equal(more.memory["momentum"], momentum) and torch.equal(more.x, own.x)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_churn_is_karras_algorithm_2(sampler: str) -> None:
    """The paper's lines one by one, for a row each of: all steps, some levels only, more than there is room for."""
    schedule, data = karras(6, 0.05, 10.0), mixture(pictures(4, SHAPE), width=0.3)
    settings = [(3.0, 0.0, math.inf, 1.0), (2.0, 0.1, 5.0, 1.003), (100.0, 0.0, math.inf, 1.0)]
    names = ("s_churn", "s_tmin", "s_tmax", "s_noise")
    options = {name: torch.tensor(values) for name, values in zip(names, zip(*settings, strict=True), strict=True)}
    painted = run(sampler, data, schedule, [1, 2, 3], SHAPE, options)
    t = schedule.sigmas.tolist()
    for row, (s_churn, s_tmin, s_tmax, s_noise) in enumerate(settings):
        x = schedule.start_scale * noise([row + 1], "decoder", 0, SHAPE)
        for i in range(6):
            gamma = min(s_churn / 6, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
            raised = t[i] * (1 + gamma)
            x = x + math.sqrt(raised**2 - t[i] ** 2) * s_noise * noise([row + 1], "decoder", i + 1, SHAPE)
            slope = (x - data(x, torch.tensor([raised])).x0) / raised
            euler = x + (t[i + 1] - raised) * slope
            if sampler == "heun" and t[i + 1] > 0:
                other = (euler - data(euler, torch.tensor([t[i + 1]])).x0) / t[i + 1]
                euler = x + (t[i + 1] - raised) * (slope + other) / 2
            x = euler
        torch.testing.assert_close(painted[row : row + 1], x, atol=2e-5, rtol=1e-4)


def test_a_row_that_churns_takes_no_noise_after_its_step() -> None:
    schedule, data = karras(6, 0.05, 10.0), mixture(pictures(4, SHAPE), width=0.3)
    both = run("euler", data, schedule, [1, 1], SHAPE, {"s_churn": torch.tensor([3.0, 0.0]), "eta": torch.ones(2)})
    churned = run("euler", data, schedule, [1], SHAPE, {"s_churn": torch.tensor([3.0])})
    ancestral = run("euler_ancestral", data, schedule, [1], SHAPE)
    torch.testing.assert_close(both, torch.cat([churned, ancestral]))
