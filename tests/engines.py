"""Engines and rows over a tiny model: methods wrapped, memory of a size, what is in flight run to its end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from gen import Engine, TextToImage
from gen.bucket import Bucket, Buckets
from gen.rows import Rows


def altered(model: TextToImage, **methods: Callable[..., Any]) -> TextToImage:
    """The same networks, with some methods of the family wrapped."""
    family = copy.copy(model.model)
    vars(family).update(methods)
    return TextToImage(family)


def buckets_of(size: int) -> Buckets:
    """As if memory held so many evaluations of the square pictures."""
    device, shape = torch.device("cpu"), (4, 8, 8)
    return Buckets({("decoder", shape, device): Bucket("decoder", device, size, ceiling=size)})


def rows_over(model: TextToImage, buckets: Buckets | None = None) -> Rows:
    """The decoder's rows, none yet; without buckets as if nothing were known of memory."""
    return Rows(model.model.call, model.model.levels.scaling, "decoder", buckets=buckets or Buckets())


def run(engine: Engine[Any], ticks: int | None = None) -> None:
    """So many ticks; None: until nothing is left to do."""
    if ticks is None:
        while engine.tick():
            pass
    else:
        for _ in range(ticks):
            engine.tick()
