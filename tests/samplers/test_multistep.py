"""The weights that multistep samplers share: exact for polynomials, whatever a row has of a past."""

import pytest
import torch

from samplers.multistep import weights

NODES = torch.tensor([0.0, -1.0, -2.5, -3.0], dtype=torch.float64)
END = 0.8  # of a step that begins at 0


@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_weights_integrate_polynomials_through_their_points_exactly(points: int) -> None:
    moments = torch.tensor([END ** (k + 1) / (k + 1) for k in range(4)], dtype=torch.float64)
    found = weights(NODES[None], moments[None], torch.tensor([points]))[0]
    for k in range(points):
        torch.testing.assert_close((found * NODES**k).sum(), moments[k])
    assert not found[points:].any()
    if points < 4:
        assert ((found * NODES**points).sum() - moments[points]).abs() > 1e-3


def test_empty_places_and_infinite_moments_of_one_row_are_no_others() -> None:
    empty = NODES.clone()
    empty[2:] = -torch.inf
    nodes, points = torch.stack([NODES, empty, empty]), torch.tensor([4, 2, 1])
    moments = torch.ones(3, 4, dtype=torch.float64)
    moments[2, 1:] = torch.inf  # a step to level 0
    together = weights(nodes, moments, points)
    assert together.isfinite().all()
    assert torch.equal(together[:1], weights(nodes[:1], moments[:1], points[:1]))
    assert together[2].tolist() == [1, 0, 0, 0]
