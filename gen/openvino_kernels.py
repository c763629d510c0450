"""Kernels of our own in a network that OpenVINO computes: convolutions, layers and norms, and attention in bfloat16.

`own_kernels` changes what OpenVINO has read and knows OpenVINO's models alone: no rows, no calls, no text. The
operations are those of `cpp/openvino.cpp`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gen import avx512
from gen.compiled import built
from gen.openvino_convolution import own_convolutions
from gen.openvino_linear import Layer, layer_at, own_linear, own_linears
from gen.openvino_model import Kernels, as_float32, constant, converted, fold, put
from gen.openvino_weights import WeightCache

logger = logging.getLogger(__name__)

TURN = (0, 2, 1, 3)  # (B, length, heads, d) as (B, heads, length, d), and back


@cache
def operations() -> Any | None:
    """An openvino.utils.node_factory.NodeFactory that knows the kernels; None, with the reason logged: none can run."""
    import openvino
    from openvino.utils.node_factory import NodeFactory

    try:
        avx512.library()
        there = Path(openvino.__file__).parent
        library = next(there.glob("libs/libopenvino.so.*"), None)
        if library is None:
            raise RuntimeError(f"{there} has no libopenvino.so")
        extension = built("openvino.cpp", [*avx512.flags(), f"-I{there / 'include'}", str(library)])
        ctypes.CDLL(str(extension))  # never closed: what OpenVINO has made of it may outlive OpenVINO's own handle
    except (RuntimeError, OSError) as error:  # what was built may not fit a library of another make
        logger.info("OpenVINO computes by its own kernels alone, not by ours: %s", error)
        return None
    factory = NodeFactory()
    factory.add_extension(extension)
    return factory


def own_kernels(model: Any, threads: int, precision: Any, weights: WeightCache) -> None:
    """Let our kernels compute what they can of an openvino.Model of fixed sizes, by so many threads, in place.

    `precision` is what they multiply in, bf16 or f32 of openvino.Type; `weights` has those they were given before.
    Where they cannot run nothing changes.
    """
    from openvino import Type

    factory = operations()
    if factory is not None:
        fold(model)  # axes and shapes, some of which are worked out
        for node in model.get_ops():
            if node.get_type_name() == "Reshape" and node.get_input_shape(0) == node.get_output_shape(0):
                put(node.output(0), node.input_value(0))
        kernels = Kernels(factory, precision, threads, weights)
        own_convolutions(model, kernels)
        if precision == Type.bf16:
            own_attention(model, kernels)
        if threads == 1:  # more would have to be woken for each layer
            own_linears(model, kernels)
        own_norms(model, kernels)
        if precision == Type.bf16:
            no_detours(model)


def own_attention(model: Any, kernels: Kernels) -> None:
    """Every plain attention.

    Queries, keys and values are read before heads are brought to the front, where that was done, and what is answered
    is handed over before they are brought back: none of these copies is made. Where all three are layers of one input,
    that is one layer, and attention reads them where they are.
    """
    from openvino import Type, opset13

    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or not fits(node):
            continue
        given = [node.input_value(place) for place in range(3)]
        turned = [is_turn(each.get_node()) for each in given]
        read = [each.get_node().input_value(0) if turn else each for each, turn in zip(given, turned, strict=True)]
        layers = [layer_at(before(each, "Reshape")) for each in read]
        scale = node.get_input_shape(0)[3] ** -0.5 if node.get_input_size() < 5 else number(node.input_value(4))
        attributes = {"turned": [int(each) for each in turned], "scale": scale, "threads": kernels.threads}
        rows, heads, _, size = node.get_input_shape(0)
        if kernels.threads == 1 and all(turned) and is_one(layers, heads * size):
            together = own_linear(kernels, joined([each for each in layers if each is not None]))
            read = [opset13.reshape(together, np.array([rows, -1, 3, heads, size]), special_zero=False).output(0)]
        answer = as_float32(
            kernels.factory.create("TileAttention", [converted(each, Type.bf16) for each in read], attributes)
        )
        for reader in node.output(0).get_target_inputs():
            put(reader.get_node().output(0), answer)


def before(output: Any, *moves: str) -> Any:
    """What an output was before nodes of these kinds moved its values."""
    while output.get_node().get_type_name() in moves:
        output = output.get_node().input_value(0)
    return output


def is_one(layers: Sequence[Layer | None], width: int) -> bool:
    """Whether these are layers of one input that our kernel computes, each of so many values."""
    found = [each for each in layers if each is not None and each.fits and len(each.bias) == width]
    return len(found) == len(layers) and all(each.x == found[0].x for each in found)


def joined(layers: Sequence[Layer]) -> Layer:
    """Layers of one input as one, what they answer beside each other."""
    weights = tuple(weight for each in layers for weight in each.weights)
    return Layer(layers[0].x, weights, np.concatenate([each.bias for each in layers]))


def own_norms(model: Any, kernels: Kernels) -> None:
    """Every group norm, and the SiLU that alone reads it.

    The kernel takes channels last, as OpenVINO's convolutions have them, and a row by one thread, so fewer rows than
    threads are left to OpenVINO.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        x, scale, shift = (node.input_value(place) for place in range(3))
        weights = [each for each in map(constant, (scale, shift)) if each is not None and each.size == x.get_shape()[1]]
        if len(weights) < 2 or x.get_shape()[0] < kernels.threads:
            continue
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        active = [each.get_type_name() for each in readers] == ["Swish"] and readers[0].get_input_size() == 1
        last = readers[0] if active else node
        attributes = {
            name: node.get_attributes()[key] for name, key in (("groups", "num_groups"), ("epsilon", "epsilon"))
        }
        attributes |= {name: data.ravel().tolist() for name, data in zip(("scale", "shift"), weights, strict=True)}
        rank = len(x.get_shape())
        turned = converted(opset13.transpose(x, np.array([0, *range(2, rank), 1])).output(0), kernels.precision)
        attributes |= {"active": active, "threads": kernels.threads}
        normed = as_float32(kernels.factory.create("GroupNormLast", [turned], attributes))
        answer = opset13.transpose(normed, np.array([0, rank - 1, *range(1, rank - 1)]))
        put(last.output(0), answer.output(0))


def no_detours(model: Any) -> None:
    """Let one of our operations read what another answers in bfloat16, not by way of float32, in place."""
    from openvino import Type, opset13

    for node in model.get_ops():
        if node.get_type_name() != "Convert" or node.get_output_element_type(0) != Type.bf16:
            continue
        moves, came = [], node.input_value(0)
        while came.get_node().get_type_name() in ("Reshape", "Transpose"):
            moves.append(came.get_node())
            came = came.get_node().input_value(0)
        if came.get_node().get_type_name() != "Convert":
            continue
        x = came.get_node().input_value(0)
        if x.get_element_type() != Type.bf16:
            continue
        for move in reversed(moves):
            if move.get_type_name() == "Reshape":
                shape = np.array(move.get_output_shape(0))
                x = opset13.reshape(x, shape, special_zero=False).output(0)
            else:
                x = opset13.transpose(x, move.input_value(1)).output(0)
        put(node.output(0), x)


def fits(node: Any) -> bool:
    """Whether our kernel computes an attention: of small heads, unmasked, whose answer is brought back."""
    query, key, value = (node.get_input_shape(place) for place in range(3))
    numbers = [number(node.input_value(place)) for place in range(3, node.get_input_size())]  # its mask, its scale
    plain = not node.get_attributes()["causal"] and numbers[:1] in ([], [0.0]) and None not in numbers[1:]
    sizes = query[3] == value[3] <= avx512.LARGEST and query[:2] == key[:2]
    return plain and sizes and all(is_turn(reader.get_node()) for reader in node.output(0).get_target_inputs())


def is_turn(node: Any) -> bool:
    """Whether it brings heads to the front, or back."""
    return node.get_type_name() == "Transpose" and tuple(node.input_value(1).get_node().get_data()) == TURN


def number(output: Any) -> float | None:
    """The number that a constant is; None for anything else."""
    data = constant(output)
    return None if data is None or data.ndim else float(data)
