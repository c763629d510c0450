"""A network as OpenVINO reads it, and what is changed in what it has read.

`read` has OpenVINO's torch front end trace one call. `drop_ones` leaves out what computes nothing, `cut_levels` takes
out what follows from a noise level, `cut_layers` and `fold_norms` say linear layers and what stands around them in
fewer operations, and `plain_norms` says group norms in some that OpenVINO fuses. All of them know OpenVINO's models
alone: no calls, no precision.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from gen.openvino_weights import WeightCache
from gen.weights import quiet


def read(network: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """What OpenVINO's torch front end makes of a network by tracing one call, as an openvino.Model of free sizes.

    Its parameters are the tensors of the example, in their order. `openvino.convert_model` does the same, and sends
    telemetry.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with quiet(), warnings.catch_warnings():  # what is traced as a constant is the same in every call that comes here
        warnings.simplefilter("ignore")
        decoder = TorchScriptPythonDecoder(network, example_input=example, trace_kwargs={"check_trace": False})
        front_end = FrontEndManager().load_by_framework("pytorch")
        return front_end.convert(front_end.load(decoder))


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a model, and which tensors it reads."""

    model: Any  # an openvino.Model
    reads: list[int]  # the place of each of its parameters among all tensors

    @classmethod
    def of(cls, model: Any, results: Sequence[Any], parameters: Sequence[Any]) -> Part:
        """What leads to these results (outputs of the model), without the parameters that it does not read."""
        import openvino

        apart = openvino.Model(list(results), list(parameters), model.get_friendly_name()).clone()
        reads = [place for place, each in enumerate(apart.get_parameters()) if each.output(0).get_target_inputs()]
        read = [apart.get_parameters()[place] for place in reads]
        return cls(openvino.Model(apart.get_results(), read, model.get_friendly_name()), reads)


@dataclass(frozen=True, eq=False)
class Kernels:
    """Our operations, as a model of fixed sizes is given them."""

    factory: Any  # an openvino.utils.node_factory.NodeFactory that knows them
    precision: Any  # what they multiply in, bf16 or f32 of openvino.Type
    threads: int  # that each computes by
    weights: WeightCache


def cut_levels(model: Any, vectors: Collection[int]) -> tuple[Part | None, Part]:
    """A model (openvino.Model) in two: what follows from a row's level and vectors alone, and the rest, given that.

    `vectors` are the places of the parameters that say these; the first part is None where there are none, or where
    what follows from them has no known size, such as a vector itself that is only shaped. The rest reads the model's
    parameters, then all that the first part says, side by side (B, ...). In a UNet that is the time embedding (Ho et
    al. 2020), that of a class or of sizes beside it, and what each residual block makes of them: few numbers, the same
    for all rows of a step, and in bfloat16 the phase of a level near 1000 would be off by whole radians.
    """
    from openvino import Type, opset13

    results = [each.input_value(0) for each in model.get_results()]
    reads: dict[str, set[str]] = {}  # by a node's name, what it follows from: a level, a picture, both or neither
    for place, each in enumerate(model.get_parameters()):
        reads[each.get_name()] = {"level" if place in vectors else "picture"}
    for node in model.get_ordered_ops():
        if node.get_name() not in reads:
            above = [] if node.get_type_name() == "ShapeOf" else [each.get_source_output() for each in node.inputs()]
            reads[node.get_name()] = set().union(*(reads[each.get_node().get_name()] for each in above))

    def beyond(output: Any) -> list[Any]:  # the inputs that read it and follow from a picture as well
        return [each for each in output.get_target_inputs() if "picture" in reads[each.get_node().get_name()]]

    cuts = [
        output
        for node in model.get_ordered_ops()
        if reads[node.get_name()] == {"level"} and node.get_type_name() != "Parameter"
        for output in node.outputs()
        if beyond(output)
    ]
    if not cuts:
        return None, Part.of(model, results, model.get_parameters())
    is_known = [
        all(size.is_static for size in list(each.get_partial_shape())[1:]) and each.get_element_type() == Type.f32
        for each in cuts
    ]
    if not all(is_known):
        return None, Part.of(model, results, model.get_parameters())
    shapes = [[size.get_length() for size in list(each.get_partial_shape())[1:]] for each in cuts]
    sizes = [math.prod(shape) for shape in shapes]
    given = opset13.parameter([-1, sum(sizes)], np.float32)
    parts = opset13.variadic_split(given, 1, np.array(sizes)).outputs()
    for each, part, shape in zip(cuts, parts, shapes, strict=True):
        read = opset13.reshape(part, np.array([0, *shape]), True)
        for reader in beyond(each):
            reader.replace_source_output(read.output(0))
    flat = [opset13.reshape(each, np.array([0, size]), True) for each, size in zip(cuts, sizes, strict=True)]
    levels = Part.of(model, [opset13.concat(flat, 1).output(0)], model.get_parameters())
    return levels, Part.of(model, results, [*model.get_parameters(), given])


def fold(model: Any) -> None:
    """Work out what follows from constants alone, in place."""
    from openvino.passes import ConstantFolding, Manager

    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)


def drop_ones(model: Any) -> None:
    """Take out every product with one, which the front end makes of torch's `add` (its alpha), in place."""
    for node in model.get_ops():
        if node.get_type_name() == "Multiply":
            given = [node.input_value(place) for place in (0, 1)]
            for factor, other in (given, given[::-1]):
                data = constant(factor)
                rank = other.get_partial_shape().rank.get_length()
                if data is not None and data.size == 1 and data == 1 and data.ndim <= rank and constant(other) is None:
                    put(node.output(0), other)


def put(place: Any, answer: Any) -> None:
    """Let all that reads one output read another."""
    for reader in place.get_target_inputs():
        reader.replace_source_output(answer)


def plain_norms(model: Any) -> None:
    """Say every group norm (Wu & He 2018) of a model (openvino.Model) as means, a product and a sum, in place.

    OpenVINO makes its own operation of a group norm, which in bfloat16 is slow; means are fast, and difference, product
    and sum are fused into one operation, which rounds once.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        attributes = node.get_attributes()
        x, scale, shift = (each.get_source_output() for each in node.inputs())
        rank = x.get_partial_shape().rank.get_length()
        grouped = opset13.reshape(x, np.array([0, attributes["num_groups"], -1]), special_zero=True)
        mean = opset13.reduce_mean(grouped, np.array([2]), keep_dims=True)  # (B, G, 1)
        apart = opset13.subtract(grouped, mean)
        variance = opset13.reduce_mean(opset13.multiply(apart, apart), np.array([2]), keep_dims=True)
        spread = opset13.sqrt(opset13.add(variance, np.float32(attributes["epsilon"])))
        by_group = np.array([1, attributes["num_groups"], -1])
        per_channel = np.array([0, -1] + [1] * (rank - 2))
        factor = opset13.divide(opset13.reshape(scale, by_group, special_zero=False), spread)  # (B, G, C / G)
        factor = opset13.reshape(factor, per_channel, special_zero=True)
        centre = opset13.tile(
            mean, np.array([1, 1, scale.get_partial_shape()[0].get_length() // attributes["num_groups"]])
        )
        centre = opset13.reshape(centre, per_channel, special_zero=True)
        shift = opset13.reshape(shift, np.array([1, -1] + [1] * (rank - 2)), special_zero=False)
        normed = opset13.add(opset13.multiply(opset13.subtract(x, centre), factor), shift)
        put(node.output(0), normed.output(0))


def cut_layers(model: Any) -> None:
    """Say every linear layer whose answer is cut in pieces (GEGLU, Shazeer 2020) as a layer for each, in place.

    OpenVINO copies what it cuts; weights are cut once.
    """
    from openvino import opset13

    for node in model.get_ops():
        layer = linear_of(node) if node.get_type_name() == "VariadicSplit" else None
        if layer is None:
            continue
        x, weight, bias = layer
        starts = np.cumsum([0, *(each.get_partial_shape()[-1].get_length() for each in node.outputs())])
        for output, start, end in zip(node.outputs(), starts, starts[1:], strict=False):
            product = opset13.matmul(x, opset13.constant(weight[start:end]), False, True)
            piece = opset13.add(product, opset13.constant(bias[start:end]))
            put(output, piece.output(0))


def fold_norms(model: Any) -> None:
    """Let every linear layer behind a layer norm (Ba et al. 2016) read it unscaled and unshifted, in place.

    Scale and shift go into the layer's weights and bias: one operation less for each norm. A norm that anything else
    reads stays as it is.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "MVN":
            continue
        scaled = constant_behind(node.output(0), "Multiply")
        shifted = None if scaled is None else constant_behind(scaled[0], "Add")
        if scaled is None or shifted is None:
            continue
        readers = [reader.get_node() for reader in shifted[0].get_target_inputs()]
        weights = [weight for reader in readers if (weight := weight_of(reader, shifted[0])) is not None]
        if len(weights) < len(readers):
            continue
        scale, shift = scaled[1].ravel(), shifted[1].ravel()
        if any({scale.size, shift.size} != {weight.shape[1]} for weight in weights):
            continue
        for reader, weight in zip(readers, weights, strict=True):
            product = opset13.matmul(node.output(0), opset13.constant(weight * scale), False, True)
            bias = (weight.astype(np.float64) @ shift).astype(np.float32)
            behind = constant_behind(reader.output(0), "Add")
            has_bias = behind is not None and is_bias(behind[1], reader.output(0), len(weight))
            whole, before = behind if behind is not None and has_bias else (reader.output(0), np.zeros(1))
            answer = opset13.add(product, opset13.constant(bias + np.ravel(before).astype(np.float32)))
            put(whole, answer.output(0))


def converted(output: Any, precision: Any) -> Any:
    """An output in a precision (of openvino.Type), by one conversion for all that read it so."""
    from openvino import opset13

    if output.get_element_type() == precision:
        return output
    for reader in output.get_target_inputs():
        node = reader.get_node()
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == precision:
            return node.output(0)
    return opset13.convert(output, precision).output(0)


def as_float32(operation: Any) -> Any:
    """What one of our operations answers, in float32 (an openvino.Output)."""
    from openvino import Type

    return converted(operation.output(0), Type.f32)


def constant_behind(output: Any, kind: str) -> tuple[Any, np.ndarray] | None:
    """The one operation of a kind that reads an output, with a constant: what it says, and that; None: no such."""
    readers = [reader.get_node() for reader in output.get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != kind:
        return None
    constants = [data for each in readers[0].inputs() if (data := constant(each.get_source_output())) is not None]
    return (readers[0].output(0), constants[0]) if len(constants) == 1 else None


def constant(output: Any) -> np.ndarray | None:
    """The data of a constant, converted or not; None for anything else."""
    node = output.get_node()
    node = node.input_value(0).get_node() if node.get_type_name() in ("Convert", "ConvertLike") else node
    return node.get_data() if node.get_type_name() == "Constant" else None


def added(answer: Any) -> tuple[Any, Any] | None:
    """The sum that alone reads an answer, and what is added there; None: it is not so."""
    readers = [reader.get_node() for reader in answer.get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != "Add":
        return None
    given = [each.get_source_output() for each in readers[0].inputs()]
    other = given[1 - given.index(answer)]
    return None if other == answer else (readers[0].output(0), other)


def weight_of(node: Any, x: Any) -> np.ndarray | None:
    """The weight (out, in) of a linear layer that reads x; None where a node is none."""
    if node.get_type_name() != "MatMul" or node.input_value(0) != x:
        return None
    attributes = node.get_attributes()
    if attributes["transpose_a"] or not attributes["transpose_b"]:
        return None
    weight = constant(node.input_value(1))
    return weight if weight is not None and weight.ndim == 2 else None


def is_bias(data: np.ndarray, product: Any, width: int) -> bool:
    """Whether a constant is one number for each value of a layer's answer, or one for all of them, in every row."""
    fits = data.size == 1 or data.shape[-1] == data.size == width
    return bool(fits and data.ndim <= product.get_partial_shape().rank.get_length())


def linear_of(node: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Input, weight (out, in) and bias (out,) of a linear layer that a node cuts along its last axis; None: no such."""
    total = node.input_value(0).get_node()
    last = node.input_value(0).get_partial_shape().rank.get_length() - 1
    if total.get_type_name() != "Add" or int(node.input_value(1).get_node().get_data()) not in (-1, last):
        return None
    product, bias = total.input_value(0).get_node(), constant(total.input_value(1))
    weight = weight_of(product, product.input_value(0)) if product.get_input_size() else None
    return None if weight is None or bias is None else (product.input_value(0), weight, bias)
