"""A network as OpenVINO reads it, and what is changed in what it has read.

`read` has OpenVINO's torch front end trace one call. `cut_waves` takes the sines and cosines out, which are computed in
float32 whatever the rest is computed in, and `plain_norms` says group norms in operations that OpenVINO fuses. All of
them know OpenVINO's models alone: no rows, no calls, no precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from gen.checkpoint import quiet


def read(network: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """What OpenVINO's torch front end makes of a network by tracing one call, as an openvino.Model of free sizes.

    Its parameters are the tensors of the example, in their order. `openvino.convert_model` does the same, and tells its
    maker over the network that it was called.
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


def cut_waves(model: Any) -> tuple[Part | None, Part]:
    """A model (openvino.Model) in two: its sines and cosines (None: there are none), and the rest, which is given them.

    The rest reads the model's parameters, then the waves. In bfloat16 the phase of a noise level near 1000 is off by
    whole radians, and a UNet's answers are twice as far off as torch's in bfloat16, where diffusers has these in
    float32.
    """
    from openvino import opset13

    cuts = [node.output(0) for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")]
    results = [each.input_value(0) for each in model.get_results()]
    if not cuts:
        return None, Part.of(model, results, model.get_parameters())
    waves = Part.of(model, cuts, model.get_parameters())
    given = [opset13.parameter(each.get_partial_shape(), each.get_element_type()) for each in cuts]
    for each, parameter in zip(cuts, given, strict=True):
        for reader in each.get_target_inputs():
            reader.replace_source_output(parameter.output(0))
    return waves, Part.of(model, results, [*model.get_parameters(), *given])


def plain_norms(model: Any) -> None:
    """Say every group norm (Wu & He 2018) of a model (openvino.Model) as means, a product and a sum, in place.

    OpenVINO makes its own operation of a group norm, which in bfloat16 is slow; means are fast, and difference, product
    and sum are fused into one operation, which rounds once.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        told = node.get_attributes()
        x, scale, shift = (each.get_source_output() for each in node.inputs())
        rank = x.get_partial_shape().rank.get_length()
        grouped = opset13.reshape(x, np.array([0, told["num_groups"], -1]), special_zero=True)
        mean = opset13.reduce_mean(grouped, np.array([2]), keep_dims=True)  # (B, G, 1)
        apart = opset13.subtract(grouped, mean)
        variance = opset13.reduce_mean(opset13.multiply(apart, apart), np.array([2]), keep_dims=True)
        spread = opset13.sqrt(opset13.add(variance, np.float32(told["epsilon"])))
        by_group = np.array([1, told["num_groups"], -1])
        per_channel = np.array([0, -1] + [1] * (rank - 2))
        factor = opset13.divide(opset13.reshape(scale, by_group, special_zero=False), spread)  # (B, G, C / G)
        factor = opset13.reshape(factor, per_channel, special_zero=True)
        centre = opset13.tile(mean, np.array([1, 1, scale.get_partial_shape()[0].get_length() // told["num_groups"]]))
        centre = opset13.reshape(centre, per_channel, special_zero=True)
        shift = opset13.reshape(shift, np.array([1, -1] + [1] * (rank - 2)), special_zero=False)
        normed = opset13.add(opset13.multiply(opset13.subtract(x, centre), factor), shift)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(normed.output(0))


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
            for reader in output.get_target_inputs():
                reader.replace_source_output(piece.output(0))


def linear_of(node: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Input, weight (out, in) and bias (out,) of a linear layer that a node cuts along its last axis; None: no such."""
    total = node.input_value(0).get_node()
    axis = node.input_value(1).get_node()
    last = node.input_value(0).get_partial_shape().rank.get_length() - 1
    if total.get_type_name() != "Add" or int(axis.get_data()) not in (-1, last):
        return None
    product, bias = (each.get_source_output().get_node() for each in total.inputs())
    if product.get_type_name() != "MatMul" or bias.get_type_name() != "Constant":
        return None
    weight = product.input_value(1).get_node()
    if weight.get_type_name() != "Constant" or not product.get_attributes()["transpose_b"]:
        return None
    return product.input_value(0), weight.get_data(), bias.get_data()
