"""Weights as our kernels read them in what OpenVINO computes, made once for all sizes that a network is compiled for.

They are laid out anew, some in a lower precision and those of convolutions up to four times as large, so a copy for
each compiled size would be most of what a network takes. Nothing here knows what a layout means.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch


class PackedWeights(NamedTuple):
    """What one of our operations reads in place of a layer's weights."""

    numbers: Any  # an openvino.Tensor
    scales: np.ndarray  # what one is, of those that are whole numbers; else empty

    @property
    def output(self) -> Any:
        """The numbers as a constant (an openvino.Output), which shares their memory."""
        from openvino import opset13

        return opset13.constant(self.numbers).output(0)


@dataclass(eq=False)
class WeightCache:
    """A network's, by their layout and by where the plain ones lie.

    They are those of when they were first asked for: a network whose weights change is read anew.
    """

    made: dict[Hashable, tuple[Sequence[np.ndarray], PackedWeights]] = field(default_factory=dict)

    def of(self, plain: Sequence[np.ndarray], layout: Hashable, make: Callable[[], PackedWeights]) -> PackedWeights:
        """The weights that `make` makes of plain ones in a layout, or made of them before.

        Plain ones are known again by where they lie, so they are kept as well, or others could come to lie there. Most
        are the network's own memory; the others are those of the model that all sizes are copies of.
        """
        place = (layout, *((each.ctypes.data, each.shape) for each in plain))
        if place not in self.made:
            self.made[place] = (plain, make())
        return self.made[place][1]


def stored(data: np.ndarray, precision: Any) -> PackedWeights:
    """Float32 numbers in a precision, bf16 or f32 of openvino.Type."""
    import openvino
    from openvino import Type

    if precision == Type.bf16:
        low = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
        return stored_as_low(low.view(torch.int16).numpy())
    tensor = openvino.Tensor(Type.f32, openvino.Shape(list(data.shape)))
    tensor.data[:] = data
    return PackedWeights(tensor, np.empty(0, np.float32))


def stored_as_low(data: np.ndarray, scales: np.ndarray | None = None) -> PackedWeights:
    """Numbers of 16 bits that OpenVINO takes for bfloat16 and keeps as they are."""
    import openvino
    from openvino import Type

    tensor = openvino.Tensor(Type.bf16, openvino.Shape(list(data.shape)))
    tensor.data[:] = np.ascontiguousarray(data).view(np.float16)  # numpy has no bfloat16, and is shown these
    return PackedWeights(tensor, np.empty(0, np.float32) if scales is None else scales)
