"""Wrapped denoisers: exact answers, diffusers' own, and each row by itself."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from samplers.state import Denoise, Prediction, per_row
from samplers.wrap import score_guided, thresholded
from tests.samplers.exact import gaussian

SHAPE = (3, 4, 4)
SIGMA = torch.tensor([0.3, 2.0, 4096.0])


def says(x0: Tensor) -> Denoise:
    return lambda x, sigma: Prediction(x0, variance=0.5 * x0)


def test_thresholding_is_that_of_diffusers() -> None:
    """For rows of pictures that stay within the range and rows that leave it, far or a little."""
    x0 = torch.randn(4, *SHAPE) * torch.tensor([0.1, 1.0, 2.0, 9.0]).reshape(-1, 1, 1, 1)
    percentile, highest = torch.tensor([0.995, 0.9, 0.995, 0.5]), torch.tensor([1.5, 1.5, 100.0, 2.0])
    ours = thresholded(says(x0), percentile, highest)(x0, torch.ones(4))
    for row in range(4):
        config = {"dynamic_thresholding_ratio": percentile[row].item(), "sample_max_value": highest[row].item()}
        expected = DDPMScheduler(thresholding=True, **config)._threshold_sample(x0[row : row + 1])
        torch.testing.assert_close(ours.x0[row : row + 1], expected)
    assert ours.x0.abs().max() <= 1
    assert torch.equal(ours.variance, 0.5 * x0)


def test_thresholding_by_another_bound_is_that_of_pixels_scaled() -> None:
    x0, bound = (
        torch.randn(3, *SHAPE) * torch.tensor([0.1, 3.0, 9.0]).reshape(-1, 1, 1, 1),
        torch.tensor([2.0, 4.0, 0.5]),
    )
    percentile = torch.tensor([0.995, 0.9, 0.5])
    ours = thresholded(says(x0), percentile, bound=bound)(x0, SIGMA).x0
    pixels = x0 / per_row(bound, x0)
    torch.testing.assert_close(ours, thresholded(says(pixels), percentile)(pixels, SIGMA).x0 * per_row(bound, x0))
    assert (ours.abs().flatten(1).amax(1) <= bound + 1e-6).all() and torch.equal(ours[0], x0[0])


def test_thresholding_is_each_rows_own_and_0_is_off() -> None:
    x0 = 5 * torch.randn(3, *SHAPE)
    percentile, highest = torch.tensor([0.0, 0.9, 0.995]), torch.full((3,), 100.0)
    together = thresholded(says(x0), percentile, highest)(x0, SIGMA).x0
    assert torch.equal(together[0], x0[0])
    for row in range(3):
        one = slice(row, row + 1)
        alone = thresholded(says(x0[one]), percentile[one], highest[one])(x0[one], SIGMA[one]).x0
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("grad", [True, False])
def test_towards_a_linear_score_is_the_tilted_gaussian(grad: bool) -> None:
    """Exact: N(m, 1) times exp(a x0) is N(m + a, 1), whose denoiser is known, whatever the level."""

    def standard(x: Tensor, sigma: Tensor, mean: float | Tensor = 0.7) -> Prediction:
        s = per_row(sigma, x)
        return Prediction((x + s**2 * mean) / (1 + s**2))

    x, slope = torch.randn(3, *SHAPE) * per_row(1 + SIGMA, torch.empty(3, *SHAPE)), torch.randn(SHAPE)
    scale = torch.tensor([1.0, 0.5, 2.0])

    def score(x0: Tensor) -> Tensor:
        return (slope * x0).flatten(1).sum(1)

    with torch.set_grad_enabled(grad):
        found = score_guided(standard, score, scale)(x, SIGMA)
    expected = standard(x, SIGMA, 0.7 + per_row(scale, x) * slope).x0
    torch.testing.assert_close(found.x0, expected, atol=1e-5, rtol=1e-4)
    assert not found.x0.requires_grad and found.variance is None


def test_towards_is_each_rows_own_and_0_is_off() -> None:
    x, scale = torch.randn(3, *SHAPE), torch.tensor([0.0, 1.0, 3.0])

    def score(x0: Tensor) -> Tensor:
        return -(x0 - 1).square().flatten(1).sum(1)

    together = score_guided(gaussian, score, scale)(x, SIGMA).x0
    assert torch.equal(together[0], gaussian(x, SIGMA).x0[0])
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(together[one], score_guided(gaussian, score, scale[one])(x[one], SIGMA[one]).x0)
    near, far = score(together)[1], score(gaussian(x, SIGMA).x0)[1]
    assert near > far


def test_wrappers_wrap_each_other() -> None:
    """The score sees the estimate before it is clipped, or after: whichever wrapper is inside."""
    x, ones = 4 * torch.randn(3, *SHAPE), torch.ones(3)

    def score(x0: Tensor) -> Tensor:
        return x0.flatten(1).sum(1)

    clipped = thresholded(score_guided(gaussian, score, ones), 0.9 * ones, 100 * ones)(x, SIGMA).x0
    assert clipped.abs().max() <= 1
    climbed = score_guided(thresholded(gaussian, 0.9 * ones, 100 * ones), score, ones)(x, SIGMA).x0
    assert climbed.isfinite().all() and (climbed - clipped).abs().max() > 1e-3
