"""Guidance is weights: it means the same in every parameterisation, and per row."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from samplers.guidance import Projection, cfg_terms, combine, in_interval, project, rescale, zero_init, zero_star
from samplers.sample import SAMPLERS, advance, start
from samplers.scaling import PREDICTION_TYPES, Scaling, denoiser
from samplers.schedule import flow, karras, make_betas
from samplers.state import Prediction, State
from tests.samplers.exact import gaussian, levels, mixture, pictures

SHAPE = (3, 4, 4)
SIGMA = torch.tensor([0.3, 2.0, 9.0])


def scaling_of(kind: str) -> Scaling:
    return Scaling.flow() if kind == "flow" else Scaling.from_betas(kind, make_betas())


def test_terms_sum_to_one_and_off_needs_no_null() -> None:
    assert cfg_terms(7.5) == {"null": -6.5, "prompt": 7.5}
    assert cfg_terms(1.0) == {"prompt": 1.0}
    for scale in (0.0, 1.0, 3.0, 7.5):
        assert sum(cfg_terms(scale).values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_guidance_commutes_with_parameterisation(kind: str) -> None:
    """Guiding the raw outputs, as diffusers does, is guiding the estimates of x0."""
    scaling = scaling_of(kind)
    x, null, prompt = (torch.randn(3, *SHAPE) for _ in range(3))
    guided_output = null + 5.0 * (prompt - null)
    estimates = torch.cat([scaling.x0(null, x, SIGMA), scaling.x0(prompt, x, SIGMA)])
    terms = cfg_terms(5.0)
    weights = torch.tensor([terms["null"]] * 3 + [terms["prompt"]] * 3)
    guided = combine(estimates, weights, torch.arange(3).repeat(2), 3)
    torch.testing.assert_close(guided, scaling.x0(guided_output, x, SIGMA), atol=2e-4, rtol=1e-4)


def test_rows_share_a_batch_with_their_own_conditions() -> None:
    """Row 0 without guidance, row 1 with it, row 2 with three prompts; evaluations in any order."""
    x0 = torch.randn(6, *SHAPE)
    rows, weights = torch.tensor([1, 2, 0, 2, 1, 2]), torch.tensor([-2.0, 0.5, 1.0, 0.25, 3.0, 0.25])
    combined = combine(x0, weights, rows, 3)
    assert torch.equal(combined[0], x0[2])
    torch.testing.assert_close(combined[1], 3 * x0[4] - 2 * x0[0])
    torch.testing.assert_close(combined[2], 0.5 * x0[1] + 0.25 * x0[3] + 0.25 * x0[5])
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    torch.testing.assert_close(combine(x0[order], weights[order], rows[order], 3), combined)


def test_interval_is_open_below_and_closed_above() -> None:
    sigma = torch.tensor([0.1, 0.3, 1.0, 5.0, 5.1])
    assert in_interval(sigma, (0.1, 5.0)).tolist() == [False, True, True, True, False]
    assert in_interval(sigma, None).all()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_rescale_is_that_of_diffusers(kind: str) -> None:
    scaling = scaling_of(kind)
    x, prompt = (torch.randn(3, *SHAPE) for _ in range(2))
    guided = prompt + 2 * torch.randn(3, *SHAPE)
    for factor in (0.0, 0.7, 1.0):
        expected = rescale_noise_cfg(guided, prompt, guidance_rescale=factor)
        ours = rescale(
            scaling.x0(guided, x, SIGMA),
            scaling.x0(prompt, x, SIGMA),
            x,
            SIGMA,
            torch.full((3,), factor),
            scaling,
        )
        torch.testing.assert_close(ours, scaling.x0(expected, x, SIGMA), atol=1e-4, rtol=1e-4)


def test_rescale_is_each_rows_own() -> None:
    scaling = scaling_of("v")
    guided, prompt, x = (torch.randn(3, *SHAPE) for _ in range(3))
    factor = torch.tensor([0.0, 0.5, 1.0])
    together = rescale(guided, prompt, x, SIGMA, factor, scaling)
    torch.testing.assert_close(together[0], guided[0])
    for row in range(3):
        one = slice(row, row + 1)
        alone = rescale(guided[one], prompt[one], x[one], SIGMA[one], factor[one], scaling)
        torch.testing.assert_close(together[one], alone)


def test_autoguidance_is_cfg_with_a_weaker_network_as_null() -> None:
    """Karras et al. 2024: the same prompt asked of two networks, the weaker one guided away from."""

    def weak(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return 0.8 * gaussian(x, sigma).x0

    x, terms = torch.randn(3, *SHAPE), cfg_terms(2.0)
    both = torch.cat([weak(x, SIGMA), gaussian(x, SIGMA).x0])
    weights = torch.tensor([terms["null"]] * 3 + [terms["prompt"]] * 3)
    guided = combine(both, weights, torch.arange(3).repeat(2), 3)
    torch.testing.assert_close(guided, gaussian(x, SIGMA).x0 + 0.2 * gaussian(x, SIGMA).x0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_zero_star_is_that_of_diffusers(kind: str) -> None:
    """The raw outputs, the null's scaled by diffusers' own; each row has its guidance scale, and 1 is off."""
    scaling, scale = scaling_of(kind), torch.tensor([1.0, 3.0, 7.5])
    x, null, prompt = (torch.randn(3, *SHAPE) for _ in range(3))
    shrunk = null * cfg_zero_star_scale(prompt.flatten(1), null.flatten(1)).reshape(-1, 1, 1, 1)
    expected = shrunk + scale.reshape(-1, 1, 1, 1) * (prompt - shrunk)
    ours = zero_star(*(scaling.x0(output, x, SIGMA) for output in (prompt, null)), x, SIGMA, scale, scaling)
    torch.testing.assert_close(ours, scaling.x0(expected, x, SIGMA), atol=2e-4, rtol=1e-4)


def test_zero_star_of_aligned_outputs_is_the_prompts() -> None:
    """Where the null says the prompt's output times a number there is nothing to guide away from."""
    scaling, x, prompt = scaling_of("flow"), torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    estimates = (scaling.x0(output, x, SIGMA) for output in (prompt, 0.3 * prompt))
    guided = zero_star(*estimates, x, SIGMA, torch.full((3,), 5.0), scaling)
    torch.testing.assert_close(guided, scaling.x0(prompt, x, SIGMA), atol=1e-4, rtol=1e-4)


def test_zero_init_keeps_a_flows_latent_where_it_is() -> None:
    """The network's latent, x / (1 + sigma), of the rows that stand still; the others move."""
    scaling, schedule = Scaling.flow(), flow(8)
    network = denoiser(lambda x, timestep: torch.ones_like(x), scaling)
    still = torch.tensor([True, False, True])

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> Prediction:
        return Prediction(zero_init(network(x, sigma).x0, x, sigma, still, scaling))

    now, next = levels(schedule, [0, 2, 3]), levels(schedule, [1, 3, 4])
    latent = torch.randn(3, *SHAPE)
    x = latent * (1 + now.sigma).reshape(-1, 1, 1, 1)
    moved = advance("euler", denoise, State(x), now, next).x / (1 + next.sigma).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(moved[still], latent[still])
    assert (moved[1] - latent[1]).abs().min() > 0.05


def projection(parallel: list[float], limit: list[float], momentum: list[float]) -> Projection:
    return Projection(*(torch.tensor(values) for values in (parallel, limit, momentum)))


def test_project_is_that_of_diffusers() -> None:
    """Three calls in a row, each row with its own settings, as diffusers guides one (in the paper's formulation)."""
    scales, parallel, limit, momentum = [1.0, 4.0, 9.0], [0.0, 0.5, 1.0], [2.0, 15.0, math.inf], [-0.5, 0.0, -0.75]
    how, running = projection(parallel, limit, momentum), torch.zeros(3, *SHAPE)
    buffers = [MomentumBuffer(value) for value in momentum]
    for _ in range(3):
        prompt, null = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
        ours, running = project(prompt, null, running, torch.tensor(scales), how)
        for row, buffer in enumerate(buffers):
            one, most = slice(row, row + 1), 0.0 if math.isinf(limit[row]) else limit[row]
            args = (scales[row] - 1, buffer, parallel[row], most, True)
            expected = normalized_guidance(prompt[one], null[one], *args)
            torch.testing.assert_close(ours[one], expected, atol=1e-5, rtol=1e-4)


def test_project_without_limits_is_guidance() -> None:
    prompt, null, before = (torch.randn(3, *SHAPE) for _ in range(3))
    how = projection([1.0] * 3, [math.inf] * 3, [0.0] * 3)
    guided, running = project(prompt, null, before, torch.full((3,), 5.0), how)
    torch.testing.assert_close(guided, null + 5 * (prompt - null))
    torch.testing.assert_close(running, prompt - null)


def test_project_keeps_off_the_prompts_direction_and_within_its_limit() -> None:
    prompt, null = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    how = projection([0.0] * 3, [0.5] * 3, [0.0] * 3)
    guided, _ = project(prompt, null, torch.zeros_like(prompt), torch.full((3,), 3.0), how)
    change = (guided - prompt).flatten(1)
    assert (change * prompt.flatten(1)).sum(1).abs().max() < 1e-4
    assert (change.norm(dim=1) <= 2 * 0.5 + 1e-5).all() and (change.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_momentum_goes_with_its_row(sampler: str) -> None:
    """Kept in the state and handed from step to step: rows that part and meet again are the rows alone."""
    schedule, data = karras(5, 0.05, 10.0), mixture(pictures(4, SHAPE), width=0.3)

    def move(state: State, at: list[int]) -> State:
        momentum, how = state.memory["momentum"], projection([0.0] * len(at), [4.0] * len(at), [-0.5] * len(at))

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> Prediction:
            nonlocal momentum
            prompt = data(x, sigma).x0
            guided, momentum = project(prompt, 0.5 * prompt.roll(1, -1), momentum, torch.full((len(at),), 3.0), how)
            return Prediction(guided)

        now, next = levels(schedule, at), levels(schedule, [index + 1 for index in at])
        moved = advance(sampler, denoise, state, now, next, torch.zeros_like(state.x))
        return moved.remember(momentum=momentum)

    def begin(row: int) -> State:
        begun = start(sampler, pictures(3, SHAPE)[row : row + 1], torch.full((1,), schedule.start_scale))
        return begun.remember(momentum=torch.zeros_like(begun.x))

    def alone(row: int, steps: int) -> State:
        state = begin(row)
        for index in range(steps):
            state = move(state, [index])
        return state

    met = move(alone(0, 3).cat(begin(1)).cat(alone(2, 1)), [3, 0, 1]).select(torch.tensor([2, 0]))
    for slot, expected in enumerate((alone(2, 2), alone(0, 4))):
        torch.testing.assert_close(met.x[slot], expected.x[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(met.memory["momentum"][slot], expected.memory["momentum"][0], atol=1e-5, rtol=1e-5)
    assert (met.memory["momentum"][0] - met.memory["momentum"][1]).abs().max() > 0.1
