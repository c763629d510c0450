"""Convolutions of 3 x 3 of our own in a network that OpenVINO computes, by fewer multiplications.

`own_convolutions` changes what OpenVINO has read and knows OpenVINO's models alone. The operation is that of
`cpp/openvino.cpp`, which computes as `cpp/winograd.hpp` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gen import avx512
from gen.openvino_model import Kernels, added, as_float32, constant, converted, put
from gen.openvino_weights import PackedWeights, stored, stored_as_low

WIDE = 32  # of whose multiples our kernel takes channels
SMALLEST_SIDE, LARGEST_SIDE = 2, 4  # of a patch's answers; the larger, the more is rounded
MOST_OF_FILTER = 32700.0  # norm of a turned filter in whole numbers of 16 bits (`cpp/winograd.hpp`)
MOST_FILTERS = 1 << 19  # in * out of the largest layer with patches of 4, whose filters become 36/9 of the plain ones
AT_A_TIME = {2: 32, 4: 16}  # patches that each thread is to have at least, by their side
# What a filter (3, 3) is turned into by, from both sides: its polynomial's values at as many numbers, each over what
# Lagrange's polynomial divides it by, and its leading number (Lavin & Gray 2016, section 4; `cpp/winograd.hpp`).
NUMBERS: dict[int, list[float]] = {2: [0, 1, -1], 4: [0, 0.75, -0.75, 1.5, -1.5]}
LAST, FIRST = np.array([0, 2, 3, 1]), np.array([0, 3, 1, 2])  # where channels go


def own_convolutions(model: Any, kernels: Kernels) -> None:
    """Every convolution of 3 x 3 that fits, with its bias and what is added to it, in place.

    Those with too few patches for the threads are left to OpenVINO, whose threads share channels too.
    """
    from openvino import opset13

    precision, threads = kernels.precision, kernels.threads
    for node in model.get_ordered_ops():
        weight = weight_of(node)
        side = None if weight is None else side_of(node.get_output_shape(0), weight.shape[1], threads, precision)
        if weight is None or side is None:
            continue
        answer, bias = node.output(0), np.zeros(len(weight), np.float32)
        per_channel = beside = None
        while (more := added(answer)) is not None:
            behind, other = more
            rows, width = answer.get_shape()[:2]
            data = constant(other)
            if data is not None and data.shape == (1, width, 1, 1):
                bias = bias + data.ravel()
            elif data is None and list(other.get_shape()) == [rows, width, 1, 1] and per_channel is None:
                per_channel = opset13.reshape(other, np.array([rows, width]), special_zero=False).output(0)
            elif data is None and other.get_shape() == answer.get_shape() and beside is None:
                beside = other
            else:
                break
            answer = behind
        filters = kernels.weights.of([weight], (side, precision), partial(packed, weight, side, precision))
        given = [last(node.input_value(0), precision), filters.output]
        given += [] if per_channel is None else [per_channel]
        given += [] if beside is None else [last(beside, precision)]
        attributes = {
            "bias": bias.tolist(),
            "scales": filters.scales.ravel().tolist(),
            "is_told": per_channel is not None,
            "threads": threads,
        }
        own = as_float32(kernels.factory.create("WinogradConvolution", given, attributes))
        put(answer, opset13.transpose(own, FIRST).output(0))


def side_of(shape: Sequence[int], inside: int, threads: int, precision: Any) -> int | None:
    """The side of patches taking fewest products for an answer (B, channels, height, width), of so many channels.

    None: it has too few. Filters of many channels are turned for small patches alone, or they would fill the memory.
    """
    rows, outside, height, width = shape
    patches = {side: rows * -(-height // side) * -(-width // side) for side in NUMBERS}
    largest = LARGEST_SIDE if inside * outside <= MOST_FILTERS and not by_tiles(precision) else SMALLEST_SIDE
    fitting = [side for side, count in patches.items() if side <= largest and count >= AT_A_TIME[side] * threads]
    return min(fitting, key=lambda side: patches[side] * (side + 2) ** 2, default=None)


def weight_of(node: Any) -> np.ndarray | None:
    """The weight (out, in, 3, 3) of a convolution that our kernel computes; None: it is none."""
    if node.get_type_name() != "Convolution":
        return None
    weight, attributes = constant(node.input_value(1)), node.get_attributes()
    if weight is None or weight.ndim != 4 or any(width % WIDE for width in weight.shape[:2]):
        return None
    plain = all(attributes[name] == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    return weight if plain and weight.shape[2:] == (3, 3) and attributes["auto_pad"] == "explicit" else None


def turn_of(side: int) -> np.ndarray:
    """What a filter is turned by for patches of a side (side + 2, 3)."""
    numbers = NUMBERS[side]
    shares = [np.prod([one - other for other in numbers if other != one]) for one in numbers]
    values = [[one**power / share for power in range(3)] for one, share in zip(numbers, shares, strict=True)]
    return np.array([*values, [0, 0, 1]])


def by_tiles(precision: Any) -> bool:
    """Whether AMX multiplies: much faster than all else, but bfloat16, which large patches would round too much."""
    from openvino import Type

    return precision == Type.bf16 and set(avx512.TILE_FLAGS) <= set(avx512.flags())


def packed(weight: np.ndarray, side: int, precision: Any) -> PackedWeights:
    """A weight (out, in, 3, 3) turned for patches of a side, (out / 32, places of a patch, ...) as our kernel reads it.

    Scales, of whole numbers, are (out / 32, places of a patch, 32).
    """
    from openvino import Type

    panels = weight.reshape(-1, WIDE, weight.shape[1], 3, 3)  # (out / 32, 32, in, 3, 3)
    turn = turn_of(side)
    turned = np.einsum("ij,pocjk,lk->pilco", turn, panels, turn, optimize=True).astype(np.float32)
    turned = turned.reshape(len(panels), (side + 2) ** 2, weight.shape[1], WIDE)
    if precision == Type.bf16 and side == LARGEST_SIDE:  # whole numbers, in pairs of inputs
        scales = np.maximum(np.linalg.norm(turned, axis=2) / MOST_OF_FILTER, np.finfo(np.float32).tiny)
        whole = np.rint(turned / scales[:, :, None]).astype(np.int16)
        pairs = whole.reshape(*whole.shape[:2], -1, 2, WIDE).swapaxes(3, 4)
        return stored_as_low(pairs, scales)
    if precision == Type.bf16:  # tiles of pairs of inputs, each for 16 values of the answer
        pairs = turned.reshape(len(panels), -1, weight.shape[1] // 32, 16, 2, 2, 16)
        turned = pairs.transpose(0, 1, 2, 5, 3, 6, 4)
    return stored(turned, precision)


def last(output: Any, precision: Any) -> Any:
    """An output (B, channels, height, width) with channels last, in a precision."""
    from openvino import opset13

    return converted(opset13.transpose(output, LAST).output(0), precision)
