"""What requests have taken is told to each: of calls that they shared, its own part."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor

from gen import TextToImage
from gen.conditioning import Conditions
from tests.engines import altered
from tests.gen.engine.asked import KINDS, PLAIN


def test_the_account_is_exact(tiny: TextToImage) -> None:
    """Against the evaluations that the networks were asked for, of requests that share calls."""
    asked = {"decoder": 0, "prior": 0}
    prior = copy.deepcopy(tiny.model.prior)
    assert prior is not None

    def call(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        asked["decoder"] += len(x)
        return tiny.model.call(x, timestep, conditions)

    def count(module: Any, given: Any, out: Tensor) -> None:
        asked["prior"] += len(out)

    painter = altered(tiny, call=call, prior=prior)
    painter.paint([replace(request, num_images_per_prompt=3) for request in (PLAIN, KINDS[7])])  # measured by these
    prior.network.proj_in.register_forward_hook(count)
    asked["decoder"] = 0
    results = painter.paint(KINDS)
    for stage, number in asked.items():
        assert sum(result.account.evaluations[stage] for result in results) == number > 0
    assert results[4].account.evaluations["decoder"] == 2 * 3 * 2 * 2  # pictures, steps, of Heun's, guided
