"""Each sampler paints what the diffusers scheduler of its name paints, from the same noise and network."""

from collections.abc import Callable

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
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from gen.scheduler import NoiseLevels
from mended import Mended3M, MendedUnCLIP
from peers import BETAS, PREDICTION, SEEDS, SHAPE, network_of, our_run, stock_of, stock_run
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

IN_SIGMA = {"unit_variance": False, "whole": False}
SPACINGS = [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]


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
    config = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": one}
    scheduler = DDIMScheduler(**BETAS, **config, clip_sample=False, prediction_type=PREDICTION[kind])
    assert_same("ddim", kind, scheduler, 10, eta, spaced(spacing, offset) | {"final": "zero" if one else "sigma_min"})


@pytest.mark.parametrize("eta", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_ddim_from_pure_noise(kind: str, eta: float) -> None:
    """Not at eta 1, where stock's own arithmetic takes the root of a negative and is NaN; ours is not."""
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample": False}
    scheduler = DDIMScheduler(**BETAS, **config, prediction_type=PREDICTION[kind])
    assert scheduler.alphas_cumprod[-1] == 0
    assert_same("ddim", kind, scheduler, 20, eta, {"max_sigma": EXACT_ZERO_SNR_SIGMA})


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("steps", [10, 13])
def test_ddpm(kind: str, spacing: str, offset: int, steps: int) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset, "variance_type": "fixed_small"}
    scheduler = DDPMScheduler(**BETAS, **config, clip_sample=False, prediction_type=PREDICTION[kind])
    assert_same("ddpm", kind, scheduler, steps, ours=spaced(spacing, offset))


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_euler(kind: str, spacing: str, offset: int, final: str) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset, "final_sigmas_type": final}
    scheduler = EulerDiscreteScheduler(**BETAS, **config, prediction_type=PREDICTION[kind])
    assert_same("euler", kind, scheduler, 13, ours=spaced(spacing, offset) | IN_SIGMA | {"final": final})


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_euler_from_clamped_zero_snr(spacing: str) -> None:
    config = {"timestep_spacing": spacing, "rescale_betas_zero_snr": True}
    scheduler = EulerDiscreteScheduler(**BETAS, **config, prediction_type="v_prediction")
    assert_same("euler", "v", scheduler, 10, ours=spaced(spacing, 0) | IN_SIGMA)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing, offset", SPACINGS)
def test_euler_ancestral(kind: str, spacing: str, offset: int) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, **config, prediction_type=PREDICTION[kind])
    assert_same("euler_ancestral", kind, scheduler, 13, ours=spaced(spacing, offset) | IN_SIGMA)


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
def test_heun(kind: str, spacing: str, offset: int) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = HeunDiscreteScheduler(**BETAS, **config, prediction_type=PREDICTION[kind])
    assert_same("heun", kind, scheduler, 9, ours=spaced(spacing, offset) | IN_SIGMA)


DPMPP = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}


@pytest.mark.parametrize("sampler", DPMPP)
@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_dpmpp(sampler: str, kind: str, spacing: str, offset: int, steps: int) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset, "algorithm_type": DPMPP[sampler]}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **config, prediction_type=PREDICTION[kind])
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
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **config, prediction_type="v_prediction")
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


# --- The rest, with levels and options as `NoiseLevels` reads them from the stock scheduler ---


def assert_equals_stock(stock: SchedulerMixin, kind: str, steps: int) -> None:
    network = network_of(kind, stock.betas)
    torch.testing.assert_close(our_run(stock, network, steps), stock_run(stock, network, steps), atol=1e-4, rtol=1e-4)


WHOLE = [
    (sampler, kind, spacing, offset)
    for sampler in ("deis", "dpm_2", "dpm_2_ancestral", "dpmpp_2s", "lcm", "lms", "unipc")
    for kind in PREDICTION
    for spacing, offset in SPACINGS
    if not (sampler.startswith("dpm_2") and kind == "x0")  # not implemented in stock
]
WHOLE += [("pndm", "eps", spacing, offset) for spacing, offset in SPACINGS if spacing == "leading"]


@pytest.mark.parametrize("sampler, kind, spacing, offset", WHOLE)
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_whole_loops(sampler: str, kind: str, spacing: str, offset: int, steps: int) -> None:
    stock = stock_of(sampler, kind, timestep_spacing=spacing, steps_offset=offset)
    assert NoiseLevels.of(stock, "here").sampler == sampler
    assert_equals_stock(stock, kind, steps)


@pytest.mark.parametrize("sampler", ["unipc", "lcm"])
def test_whole_loops_from_clamped_zero_snr(sampler: str) -> None:
    stock = stock_of(sampler, "v", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert_equals_stock(stock, "v", 10)


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    "sampler, solver, final",
    [
        ("unipc", "bh2", "zero"),
        ("unipc", "bh2", "sigma_min"),
        ("unipc", "bh1", "sigma_min"),
        ("deis", "logrho", "zero"),
    ],
)
def test_orders(sampler: str, solver: str, final: str, order: int, lower: bool, steps: int) -> None:
    config = {"solver_order": order, "solver_type": solver, "lower_order_final": lower, "final_sigmas_type": final}
    if (sampler, final, lower) == ("unipc", "zero", False) and order > 1:
        # stock divides infinity by itself; a step to level 0 is first-order here
        assert our_run(stock_of(sampler, **config), network_of("eps", make_betas()), steps).isfinite().all()
    else:
        assert_equals_stock(stock_of(sampler, **config), "eps", steps)


def test_unipc_bh1_reaches_level_0() -> None:
    """Stock's is NaN there: minus infinity times zero. Another B(h) changes little, and the order nothing."""
    stock, network = stock_of("unipc", solver_type="bh1"), network_of("eps", make_betas())
    assert stock_run(stock, network, 16).isnan().all()
    torch.testing.assert_close(our_run(stock, network, 16), our_run(stock_of("unipc"), network, 16), atol=0.02, rtol=0)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("steps", [4, 5, 16])
def test_pairs_of_single_steps_to_the_smallest_level(lower: bool, steps: int) -> None:
    stock = stock_of("dpmpp_2s", "v", final_sigmas_type="sigma_min", lower_order_final=lower)
    assert_equals_stock(stock, "v", steps)


@pytest.mark.parametrize("sampler, least", [("dpmpp_3m", 1e-4), ("dpmpp_3m_sde", 1e-2)])
@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("steps, final", [(3, "zero"), (10, "sigma_min"), (16, "zero")])
def test_third_order(sampler: str, least: float, kind: str, spacing: str, offset: int, steps: int, final: str) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset, "final_sigmas_type": final}
    stock, network = stock_of(sampler, kind, **config), network_of(kind, make_betas())
    painted = our_run(stock, network, steps)
    torch.testing.assert_close(painted, stock_run(Mended3M(**stock.config), network, steps), atol=1e-4, rtol=1e-4)
    if steps > 3:
        assert (painted - stock_run(stock, network, steps)).abs().max() > least


@pytest.mark.parametrize("sampler", ["dpmpp_3m", "dpmpp_3m_sde"])
def test_third_order_from_clamped_zero_snr(sampler: str) -> None:
    stock = stock_of(sampler, "v", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    network = network_of("v", stock.betas)
    theirs = stock_run(Mended3M(**stock.config), network, 10)
    torch.testing.assert_close(our_run(stock, network, 10), theirs, atol=1e-4, rtol=1e-4)


def with_variance(network: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that says in a second half of its channels how much noise a step adds."""

    def learned(latent: Tensor, timestep: Tensor) -> Tensor:
        output = network(latent, timestep)
        return torch.cat([output, (3 * output).sin()], 1)

    return learned


@pytest.mark.parametrize("kind", PREDICTION)
@pytest.mark.parametrize("steps", [10, 13])
def test_ddpm_with_a_learned_variance(kind: str, steps: int) -> None:
    """From timestep 0, where stock adds no noise either; from a later last one it does, by the variance's say."""
    stock, plain = stock_of("ddpm", kind, variance_type="learned_range"), network_of(kind, make_betas())
    network = with_variance(plain)
    painted = our_run(stock, network, steps)
    torch.testing.assert_close(painted, stock_run(stock, network, steps), atol=1e-4, rtol=1e-4)
    assert (painted - our_run(stock_of("ddpm", kind), plain, steps)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["eps", "x0"])
@pytest.mark.parametrize("variance", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("clip", [None, 0.5, 5.0])
@pytest.mark.parametrize("steps", [2, 10, 25])
def test_unclip(kind: str, variance: str, clip: float | None, steps: int) -> None:
    config = {"variance_type": variance, "clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    stock = stock_of("unclip", kind, **config)
    network = network_of(kind, stock.betas)
    network = with_variance(network) if variance == "learned_range" else network
    theirs = stock_run(MendedUnCLIP(**stock.config), network, steps)
    # its first levels hold x0 in the last digits of eps: sigma is 20291 there
    torch.testing.assert_close(our_run(stock, network, steps), theirs, atol=5e-3 if kind == "eps" else 1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "spacing", "distances"),
    [("eps", "linspace", {20: 0.03, 50: 0.006}), ("v", "trailing", {20: 0.04, 50: 0.02})],
)
def test_pndm_is_nearer_the_path_than_stock(kind: str, spacing: str, distances: dict[int, float]) -> None:
    """Stock steps beside the level it reads next (linspace), and mixes v of different levels as if of one.

    As far from ours as docs/differences.md says, of the largest value, by the number of steps.
    """
    config = {"timestep_spacing": spacing, "set_alpha_to_one": True}
    stock, network = stock_of("pndm", kind, **config), network_of(kind, make_betas())
    fine = from_betas(stock.betas, 300, spacing=spacing)
    path = run("heun", denoiser(network, Scaling.from_betas(kind, stock.betas)), fine, SEEDS, SHAPE)
    for steps, distance in distances.items():
        ours, theirs = our_run(stock, network, steps), stock_run(stock, network, steps)
        apart = (ours - theirs).abs().max() / theirs.abs().max()
        assert apart.item() == pytest.approx(distance, rel=0.3)
        assert (ours - path).norm() < 0.8 * (theirs - path).norm()


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
    config = {"timestep_spacing": spacing, "steps_offset": offset}
    for stock, ours in [
        (DDIMScheduler, {}),
        (DDPMScheduler, {}),
        (EulerDiscreteScheduler, {"whole": False}),
        (HeunDiscreteScheduler, {"whole": False}),
        (DPMSolverMultistepScheduler, {"beyond_last": True}),
    ]:
        if steps == 999 and offset and stock is DPMSolverMultistepScheduler:
            continue  # stock goes beyond the last timestep, where two levels are one (`test_levels`)
        scheduler = stock(**BETAS, **config)
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
