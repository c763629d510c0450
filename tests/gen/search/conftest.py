"""A tiny model that counts what its networks are asked."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from gen import TextToImage
from tests.engines import altered
from tests.gen.search.asked import ASKED, CHOOSING, LARGE, Counted


@pytest.fixture
def counted(tiny: TextToImage) -> Counted:
    """The tiny model, counting; its memory is measured and its preview fitted already."""
    seen: Counter[str] = Counter()

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(given: Tensor, *rest: Any) -> Tensor:
            seen[name] += len(given)
            return function(given, *rest)

        return call

    clip, prior = copy.copy(tiny.model.clip), copy.deepcopy(tiny.model.prior)
    assert clip is not None and prior is not None
    vars(clip)["image"] = noted("score", clip.image)
    methods = {name: noted(name, getattr(tiny.model, name)) for name in ("call", "decode", "preview")}
    model = altered(tiny, clip=clip, prior=prior, **methods)
    model.paint([ASKED, LARGE, CHOOSING["large halving"]])
    prior.network.proj_in.register_forward_hook(lambda module, given, out: seen.update(prior=len(out)))
    seen.clear()
    return Counted(model, seen)
