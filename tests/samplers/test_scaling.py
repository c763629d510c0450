"""The wall: networks' words on one side, x = x0 + sigma * eps on the other."""

from dataclasses import replace

import pytest
import torch

from samplers.scaling import PREDICTION_TYPES, Scaling, denoiser
from samplers.schedule import make_betas, training_sigmas, zero_terminal_snr
from samplers.state import per_row
from tests.samplers.exact import mixture, pictures

BETAS = {
    "linear": make_betas("linear", 1000, 0.0001, 0.02),
    "scaled_linear": make_betas("scaled_linear"),
    "cosine": make_betas("cosine"),
    "zero_snr": zero_terminal_snr(make_betas("scaled_linear")),
    "short": make_betas("linear", 20, 0.01, 0.3),
}
SHAPE = (3, 4, 4)


def every_scaling() -> list:
    made = [
        pytest.param(Scaling.from_betas(kind, betas), id=f"{kind}-{name}")
        for kind in PREDICTION_TYPES
        if kind != "flow"
        for name, betas in BETAS.items()
    ]
    return [*made, pytest.param(Scaling.flow(), id="flow")]


@pytest.fixture
def noised(scaling: Scaling) -> tuple[torch.Tensor, ...]:
    """(x0, eps, sigma, x) at levels over the whole table but for a flow's two ends."""
    timestep = torch.linspace(1, len(scaling.sigmas) - 2, 9).round()
    sigma = scaling.sigma(timestep)
    x0, eps = pictures(9, SHAPE), torch.randn(9, *SHAPE)
    return x0, eps, sigma, x0 + per_row(sigma, x0) * eps


@pytest.mark.parametrize("scaling", every_scaling())
def test_timesteps_are_the_integers_at_training_levels(scaling: Scaling) -> None:
    integers = torch.arange(len(scaling.sigmas))
    assert torch.equal(scaling.timestep(scaling.sigmas.float()), integers.float())
    assert torch.equal(scaling.timestep(scaling.sigma(integers)), integers.float())
    assert scaling.sigmas.isfinite().all() and (scaling.sigmas.diff() > 0).all()


@pytest.mark.parametrize("scaling", every_scaling())
def test_timesteps_between_training_levels(scaling: Scaling) -> None:
    """There and back, in order, and never beyond the table."""
    between = torch.linspace(1, len(scaling.sigmas) - 2, 777)
    back = scaling.timestep(scaling.sigma(between))
    torch.testing.assert_close(back, between, atol=2e-3, rtol=0)
    assert (back.diff() > 0).all()
    outside = scaling.timestep(torch.tensor([0.0, 1e8]))
    assert outside.tolist() == [0, len(scaling.sigmas) - 1]


def test_zero_snr_is_a_finite_level() -> None:
    assert training_sigmas(BETAS["zero_snr"])[-1] == 4096
    assert training_sigmas(BETAS["zero_snr"], max_sigma=1e6)[-1] == 1e6
    assert Scaling.flow().sigmas[-1] == 1e6
    # either stand-in is the last timestep to a network
    assert Scaling.from_betas("v", BETAS["zero_snr"]).timestep(torch.tensor([1e6])).item() == 999


@pytest.mark.parametrize("scaling", every_scaling())
def test_target_stands_for_x0_and_output_inverts(scaling: Scaling, noised: tuple[torch.Tensor, ...]) -> None:
    x0, eps, sigma, x = noised
    target = scaling.target(x0, eps, sigma)
    # eps cannot carry x0 where there is almost none of it: float32 of x is then all that can be asked
    tolerance = 1e-5 * (1 + per_row(sigma, x).expand_as(x))
    assert ((scaling.x0(target, x, sigma) - x0).abs() <= tolerance).all()
    torch.testing.assert_close(scaling.output(scaling.x0(target, x, sigma), x, sigma), target, atol=3e-4, rtol=1e-4)
    torch.testing.assert_close(scaling.x0(scaling.output(x0, x, sigma), x, sigma), x0, atol=1e-2, rtol=1e-3)


def test_targets_are_those_of_the_papers() -> None:
    """The v of Salimans & Ho 2022 from alpha_bar; the flow's velocity d/dt ((1 - t) x0 + t eps)."""
    alpha_bar = (1 - BETAS["scaled_linear"]).cumprod(0)
    timestep = torch.tensor([0, 250, 999])
    x0, eps = pictures(3, SHAPE), torch.randn(3, *SHAPE)
    a = alpha_bar[timestep].reshape(-1, 1, 1, 1)
    z = a.sqrt() * x0 + (1 - a).sqrt() * eps
    expected = {"eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0, "x0": x0}
    for kind, target in expected.items():
        scaling = Scaling.from_betas(kind, BETAS["scaled_linear"])
        sigma = scaling.sigma(timestep)
        torch.testing.assert_close(scaling.target(x0, eps, sigma), target)
        torch.testing.assert_close(scaling.network_input(x0 + per_row(sigma, x0) * eps, sigma), z)
    flow, time = Scaling.flow(), torch.tensor([0.1, 0.5, 0.9])
    sigma = flow.sigma(1000 * time)
    torch.testing.assert_close(flow.target(x0, eps, sigma), eps - x0)
    t = time.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(flow.network_input(x0 + per_row(sigma, x0) * eps, sigma), (1 - t) * x0 + t * eps)
    torch.testing.assert_close(flow.timestep(sigma), 1000 * time)


@pytest.mark.parametrize("scaling", every_scaling())
def test_a_whole_schedule_is_preconditioned_as_its_levels_are(scaling: Scaling) -> None:
    """To the last bit, so that it does not matter which of the two a row's step was given; a sigma of 0 among them."""
    sigmas = scaling.sigmas.float()[torch.linspace(len(scaling.sigmas) - 1, 0, 21).long()]
    table = torch.stack([torch.cat([sigmas, torch.zeros(1)]), sigmas.new_tensor([14.6146, *range(20, -1, -1)])], 1)
    whole = scaling.preconditioning(table).values
    for place, level in enumerate(table):
        assert torch.equal(whole[:, place], scaling.preconditioning(level).values)
        for row in range(2):
            alone = scaling.preconditioning(level[row : row + 1])
            assert torch.equal(scaling.preconditioning(level).select(torch.tensor([row])).values, alone.values)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma: float) -> None:
    """Hang et al. 2023: min(SNR, gamma) on x0, over SNR on eps, over SNR + 1 on v."""
    scaling = {kind: Scaling.from_betas(kind, BETAS["scaled_linear"]) for kind in ("eps", "v", "x0")}
    timestep = torch.tensor([0, 100, 500, 999])
    alpha_bar = (1 - BETAS["scaled_linear"]).cumprod(0)[timestep]
    snr = alpha_bar / (1 - alpha_bar)
    capped = snr.clamp(max=gamma)
    sigma = scaling["eps"].sigma(timestep)
    for kind, expected in {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}.items():
        torch.testing.assert_close(scaling[kind].loss_weight(sigma, gamma), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", every_scaling())
def test_min_snr_asks_the_same_of_every_parameterisation(scaling: Scaling, noised: tuple[torch.Tensor, ...]) -> None:
    """The weighted error of the output is min(SNR, gamma) times the error of x0, whatever the output is."""
    x0, eps, sigma, x = noised
    near = sigma < 100  # beyond, eps carries no x0 in float32
    x0, eps, sigma, x = x0[near], eps[near], sigma[near], x[near]
    wrong = x0 + 0.3 * torch.randn_like(x0)
    error = (scaling.output(wrong, x, sigma) - scaling.target(x0, eps, sigma)).square().mean((1, 2, 3))
    expected = sigma.pow(-2).clamp(max=5) * (wrong - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(scaling.loss_weight(sigma, 5.0) * error, expected, rtol=2e-3, atol=1e-6)
    assert torch.equal(scaling.loss_weight(sigma, None), torch.ones_like(sigma))
    assert scaling.loss_weight(torch.zeros(1), 5.0).isfinite().all()


@pytest.mark.parametrize("scaling", every_scaling())
def test_denoiser_of_a_perfect_network(scaling: Scaling, noised: tuple[torch.Tensor, ...]) -> None:
    """A network that says what it would be trained to say is heard as the best estimate of x0."""
    _, _, sigma, x = noised
    near = sigma < 100
    sigma, x = sigma[near], x[near]
    best = mixture(pictures(4, SHAPE), width=0.3)

    def network(seen: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert torch.equal(timestep, scaling.timestep(sigma)) and seen.std() < 3
        return scaling.output(best(x, sigma).x0, x, sigma)

    torch.testing.assert_close(denoiser(network, scaling)(x, sigma).x0, best(x, sigma).x0, atol=1e-4, rtol=1e-4)


def test_half_precision_outputs_are_read_in_float32() -> None:
    scaling, x, sigma = (
        Scaling.from_betas("eps", BETAS["scaled_linear"]),
        torch.randn(2, *SHAPE),
        torch.ones(2),
    )
    prediction = denoiser(lambda seen, timestep: seen.bfloat16(), scaling)(x, sigma)
    assert prediction.x0.dtype == torch.float32


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_learned_range_is_the_second_half_of_the_channels(kind: str) -> None:
    """-1 of the network is the smallest variance, said as 0, and 1 the largest; the first half is as ever."""
    plain = Scaling.flow() if kind == "flow" else Scaling.from_betas(kind, BETAS["cosine"])
    x, sigma, output = torch.randn(2, *SHAPE), torch.ones(2), torch.randn(2, *SHAPE)
    learned = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    ranged = replace(plain, learned_range=True)
    found = denoiser(lambda seen, timestep: torch.cat([output, learned], 1), ranged)(x, sigma)
    assert torch.equal(found.x0, denoiser(lambda seen, timestep: output, plain)(x, sigma).x0)
    assert found.variance.flatten()[[0, -1]].tolist() == [0, 1]
    assert denoiser(lambda seen, timestep: output, plain)(x, sigma).variance is None


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type='epsilon' is unknown; choose from: eps, v, x0, flow"):
        Scaling.from_betas("epsilon", BETAS["linear"])  # type: ignore[arg-type]
