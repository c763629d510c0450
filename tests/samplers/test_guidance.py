"""Guidance is weights: it means the same in every parameterisation, and per row."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from samplers.guidance import cfg_terms, combine, in_interval, rescale
from samplers.scaling import KINDS, Scaling
from samplers.schedule import make_betas

SHAPE = (3, 4, 4)
SIGMA = torch.tensor([0.3, 2.0, 9.0])


def scaling_of(kind: str) -> Scaling:
    return Scaling.flow() if kind == "flow" else Scaling.from_betas(kind, make_betas())


def test_terms_sum_to_one_and_off_needs_no_null() -> None:
    assert cfg_terms(7.5) == {"null": -6.5, "prompt": 7.5}
    assert cfg_terms(1.0) == {"prompt": 1.0}
    for scale in (0.0, 1.0, 3.0, 7.5):
        assert sum(cfg_terms(scale).values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
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
