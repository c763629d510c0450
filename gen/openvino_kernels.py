"""Kernels of our own in a network that OpenVINO computes in bfloat16: attention by that of `gen.amx`, and group norms.

`own_kernels` changes what OpenVINO has read and knows OpenVINO's models alone: no rows, no calls, no text. The
operations are those of `cpp/openvino.cpp`.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gen import amx
from gen.compiled import built
from gen.openvino_model import constant

logger = logging.getLogger(__name__)

TURN = (0, 2, 1, 3)  # (B, length, heads, d) as (B, heads, length, d), and back


@cache
def operations() -> Any | None:
    """An openvino.utils.node_factory.NodeFactory that knows the kernels; None, with the reason logged: none can run."""
    import openvino
    from openvino.utils.node_factory import NodeFactory

    try:
        amx.library()
        there = Path(openvino.__file__).parent
        library = next(there.glob("libs/libopenvino.so.*"), None)
        if library is None:
            raise RuntimeError(f"{there} has no libopenvino.so")
        extension = built("openvino.cpp", [*amx.FLAGS, f"-I{there / 'include'}", str(library)])
    except RuntimeError as error:
        logger.info("OpenVINO computes attention and group norms by its own kernels, not by ours: %s", error)
        return None
    factory = NodeFactory()
    factory.add_extension(extension)
    return factory


def own_kernels(model: Any, threads: int) -> None:
    """Let our kernels compute what they can of an openvino.Model of fixed sizes, by so many threads, in place.

    Where they cannot run nothing changes.
    """
    factory = operations()
    if factory is not None:
        own_attention(model, factory, threads)
        own_norms(model, factory, threads)


def own_attention(model: Any, factory: Any, threads: int) -> None:
    """Every plain attention.

    Queries, keys and values are read before heads are brought to the front, where that was done, and what is answered
    is handed over before they are brought back: none of these copies is made.
    """
    from openvino import Type, opset13

    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or not fits(node):
            continue
        given = [node.input_value(place) for place in range(3)]
        turned = [is_turn(each.get_node()) for each in given]
        read = [each.get_node().input_value(0) if turn else each for each, turn in zip(given, turned, strict=True)]
        scale = node.get_input_shape(0)[3] ** -0.5 if node.get_input_size() < 5 else number(node.input_value(4))
        told = {"turned": [int(each) for each in turned], "scale": scale, "threads": threads}
        attention = factory.create("AmxAttention", [opset13.convert(each, Type.bf16).output(0) for each in read], told)
        answer = opset13.convert(attention, Type.f32)
        for reader in node.output(0).get_target_inputs():
            for behind in reader.get_node().output(0).get_target_inputs():
                behind.replace_source_output(answer.output(0))


def own_norms(model: Any, factory: Any, threads: int) -> None:
    """Every group norm, and the SiLU that alone reads it.

    The kernel takes channels last, as OpenVINO's convolutions have them, and a row by one thread, so fewer rows than
    threads are left to OpenVINO.
    """
    from openvino import Type, opset13

    for node in model.get_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        x, scale, shift = (node.input_value(place) for place in range(3))
        weights = [each for each in map(constant, (scale, shift)) if each is not None and each.size == x.get_shape()[1]]
        if len(weights) < 2 or x.get_shape()[0] < threads:
            continue
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        active = [each.get_type_name() for each in readers] == ["Swish"] and readers[0].get_input_size() == 1
        last = readers[0] if active else node
        told = {name: node.get_attributes()[key] for name, key in (("groups", "num_groups"), ("epsilon", "epsilon"))}
        told |= {name: data.ravel().tolist() for name, data in zip(("scale", "shift"), weights, strict=True)}
        rank = len(x.get_shape())
        turned = opset13.convert(opset13.transpose(x, np.array([0, *range(2, rank), 1])), Type.bf16)
        told |= {"active": active, "threads": threads}
        normed = opset13.convert(factory.create("GroupNormLast", [turned.output(0)], told), Type.f32)
        answer = opset13.transpose(normed, np.array([0, rank - 1, *range(1, rank - 1)]))
        for reader in last.output(0).get_target_inputs():
            reader.replace_source_output(answer.output(0))


def fits(node: Any) -> bool:
    """Whether our kernel computes an attention: of small heads, unmasked, whose answer is brought back."""
    query, key, value = (node.get_input_shape(place) for place in range(3))
    told = [number(node.input_value(place)) for place in range(3, node.get_input_size())]  # its mask, its scale
    plain = not node.get_attributes()["causal"] and told[:1] in ([], [0.0]) and None not in told[1:]
    sizes = query[3] == value[3] <= amx.LARGEST and query[:2] == key[:2]
    return plain and sizes and all(is_turn(reader.get_node()) for reader in node.output(0).get_target_inputs())


def is_turn(node: Any) -> bool:
    """Whether it brings heads to the front, or back."""
    return node.get_type_name() == "Transpose" and tuple(node.input_value(1).get_node().get_data()) == TURN


def number(output: Any) -> float | None:
    """The number that a constant is; None for anything else."""
    data = constant(output)
    return None if data is None or data.ndim else float(data)
