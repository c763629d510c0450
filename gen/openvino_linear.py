"""Linear layers of our own in a network that OpenVINO computes, with what stands around them.

`own_linears` changes what OpenVINO has read and knows OpenVINO's models alone. The operation is that of
`cpp/openvino.cpp`, which computes as `cpp/linear.hpp` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gen.openvino_model import Kernels, added, as_float32, constant, converted, is_bias, put, weight_of
from gen.openvino_weights import PackedWeights, stored

ROW, BESIDE = 32, 16  # of whose multiples our kernel takes inputs and answers: a row of a tile, and its columns
FUSED = {"Gelu", "Swish", "Relu", "Sigmoid", "Tanh", "HSwish", "Clamp"}  # which OpenVINO computes within its own layer


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer as it stands in a model (openvino.Model)."""

    x: Any  # the output (..., in) that it reads, an openvino.Output
    weights: tuple[np.ndarray, ...]  # (out, in) each, of layers that answer beside each other
    bias: np.ndarray  # (out,) of them all

    @property
    def fits(self) -> bool:
        """Whether our kernel computes it."""
        return self.weights[0].shape[1] % ROW == 0 and len(self.bias) % BESIDE == 0


def own_linears(model: Any, kernels: Kernels) -> None:
    """Every linear layer that fits, in place, with a layer norm before it and GELU, GEGLU or a sum behind it.

    One with another activation behind it is left to OpenVINO, which computes both in one.
    """
    for node in model.get_ops():
        pair = gated(node)
        if pair is not None and all(layer.fits for layer in pair):
            put(node.output(0), own_linear(kernels, *pair))
    for node in model.get_ordered_ops():  # what a layer reads before the layer
        if node.get_type_name() != "MatMul":
            continue
        answer = whole(node.output(0))
        layer = layer_at(answer)
        if layer is None or not layer.fits:
            continue
        readers = [reader.get_node() for reader in answer.get_target_inputs()]
        active, beside = len(readers) == 1 and is_gelu(readers[0]), alike(answer)
        kinds = [reader.get_type_name() for reader in readers]
        if active or beside is not None:
            put(readers[0].output(0), own_linear(kernels, layer, active=active, beside=beside))
        elif not FUSED & set(kinds) and kinds != ["Multiply", "Multiply"]:  # x and sigmoid(1.702 x), OpenAI's GELU
            put(answer, own_linear(kernels, layer))


def own_linear(
    kernels: Kernels,
    layer: Layer,
    gates: Layer | None = None,
    beside: Any | None = None,
    active: bool = False,
) -> Any:
    """Our operation in the place of a layer and of the one that feeds it; its answer (an openvino.Output) is float32.

    `gates`, of the same input, is what GEGLU multiplies by; `beside` an output that is added to the answer; `active`
    says whether GELU is behind it.
    """
    x, epsilon, precision = layer.x, None, kernels.precision
    if x.get_node().get_type_name() == "MVN" and is_last(x.get_node()):
        epsilon = x.get_node().get_attributes()["eps"]
        x = x.get_node().input_value(0)
    plain = [*layer.weights, *(() if gates is None else gates.weights)]
    packed_weights = kernels.weights.of(plain, (gates is None, precision), partial(packed, layer, gates, precision))
    weight, bias = packed_weights.output, biases(layer, gates).tolist()
    more = [] if beside is None else [converted(beside, precision)]
    is_plain = epsilon is None and gates is None and not active
    before = feeding(x) if is_plain else None
    if before is None:
        attributes = {"bias": bias, "out": len(layer.bias), "active": active, "gated": gates is not None}
        attributes |= {"normed": epsilon is not None, "epsilon": epsilon or 0.0}
        answer = kernels.factory.create("TileLinear", [converted(x, precision), weight, *more], attributes)
    else:
        first = before.get_attributes()
        attributes = {name: first[name] for name in ("normed", "epsilon", "gated")}
        attributes |= {"first": list(first["bias"]), "between": first["out"], "second": bias, "out": len(layer.bias)}
        answer = kernels.factory.create("TileFeedForward", [*before.input_values(), weight, *more], attributes)
    return as_float32(answer)


def packed(layer: Layer, gates: Layer | None, precision: Any) -> PackedWeights:
    """A layer's weights as our kernel reads them, with those of its gates."""
    from openvino import Type

    weight = interleaved(*(np.concatenate(each.weights) for each in (layer, gates) if each is not None))
    if precision == Type.bf16:  # tiles of pairs of inputs
        pairs = weight.reshape(-1, 2, BESIDE, weight.shape[1] // ROW, ROW // 2, 2).transpose(0, 3, 1, 4, 2, 5)
    else:
        pairs = weight.reshape(-1, 2 * BESIDE, weight.shape[1]).transpose(0, 2, 1)
    return stored(pairs, precision)


def biases(layer: Layer, gates: Layer | None) -> np.ndarray:
    """As many biases as `packed` has rows."""
    return interleaved(*(each.bias for each in (layer, gates) if each is not None))


def interleaved(*rows: np.ndarray) -> np.ndarray:
    """16 rows (out, ...) of the first, as many of the second, and so on; none at the end, for 32 are read at once."""
    mixed = np.stack([each.reshape(-1, BESIDE, *each.shape[1:]) for each in rows], 1).reshape(-1, *rows[0].shape[1:])
    return np.pad(mixed, ((0, -len(mixed) % (2 * BESIDE)), *((0, 0) for _ in mixed.shape[1:])))


def feeding(x: Any) -> Any | None:
    """Our layer with GELU or GEGLU behind it whose answer x is, where nothing else reads that; None: no such."""
    layer = x.get_node().input_value(0).get_node() if x.get_node().get_type_name() == "Convert" else x.get_node()
    if layer.get_type_name() != "TileLinear" or len(x.get_target_inputs()) > 1:
        return None
    attributes = layer.get_attributes()
    return layer if attributes["active"] or attributes["gated"] else None


def gated(node: Any) -> tuple[Layer, Layer] | None:
    """The layers of a node that multiplies one with the GELU of the other (GEGLU), that one last; None: no such."""
    if node.get_type_name() != "Multiply":
        return None
    for place in (0, 1):
        gelu, value = node.input_value(place).get_node(), layer_at(node.input_value(1 - place))
        if is_gelu(gelu):
            gates = layer_at(gelu.input_value(0))
            if value is not None and gates is not None and value.x == gates.x and len(value.bias) == len(gates.bias):
                return value, gates
    return None


def is_gelu(node: Any) -> bool:
    """Whether it is GELU by the error function."""
    return bool(node.get_type_name() == "Gelu" and node.get_attributes()["approximation_mode"] == "ERF")


def layer_at(output: Any) -> Layer | None:
    """The linear layer that an output is the answer of, with its bias where it has one; None: of no such."""
    node, bias = output.get_node(), None
    if node.get_type_name() == "Add":
        given = [each.get_source_output() for each in node.inputs()]
        constants = [data for each in given if (data := constant(each)) is not None]
        rest = [each for each in given if constant(each) is None]
        if len(constants) != 1 or len(rest) != 1:
            return None
        bias, node = constants[0], rest[0].get_node()
    weight = weight_of(node, node.input_value(0)) if node.get_type_name() == "MatMul" else None
    if weight is None or (bias is not None and not is_bias(bias, node.output(0), len(weight))):
        return None
    shift = np.zeros(1) if bias is None else bias.ravel()
    weight = weight.astype(np.float32, copy=False)  # where it lies, it is known again (`WeightCache`)
    return Layer(node.input_value(0), (weight,), np.broadcast_to(shift, len(weight)).astype(np.float32))


def whole(product: Any) -> Any:
    """The answer of a layer whose product this is: that with a bias, where that alone reads it."""
    readers = [reader.get_node() for reader in product.get_target_inputs()]
    has_bias = len(readers) == 1 and readers[0].get_type_name() == "Add" and layer_at(readers[0].output(0)) is not None
    return readers[0].output(0) if has_bias else product


def alike(answer: Any) -> Any | None:
    """What is added to an answer, of its shape, where nothing else reads that; None: it is not so."""
    more = added(answer)
    is_alike = more is not None and more[1].get_partial_shape() == answer.get_partial_shape()
    return more[1] if more is not None and is_alike and constant(more[1]) is None else None


def is_last(norm: Any) -> bool:
    """Whether an MVN goes over the last axis alone, as a layer norm without scale and shift."""
    axes, attributes = constant(norm.input_value(1)), norm.get_attributes()
    last = norm.input_value(0).get_partial_shape().rank.get_length() - 1
    plain = attributes["normalize_variance"] and str(attributes["eps_mode"]).lower() == "inside_sqrt"
    return plain and axes is not None and axes.ravel().tolist() in ([-1], [last])
