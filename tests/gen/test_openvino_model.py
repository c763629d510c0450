"""What is changed in a network as OpenVINO has read it: it computes the same, in other operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from gen.openvino_model import cut_layers, cut_waves, plain_norms, read

pytest.importorskip("openvino")


def answers(model: Any, *given: Tensor) -> list[Tensor]:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [torch.from_numpy(each) for each in compiled([each.numpy() for each in given]).values()]


def types(model: Any) -> set[str]:
    return {node.get_type_name() for node in model.get_ops()}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def norm() -> nn.Module:
    layer = nn.GroupNorm(4, 16)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize(
    "make, given, change, gone",
    [
        (norm, drawn(3, 16, 5, 6) + 3, plain_norms, "GroupNormalization"),
        (norm, drawn(3, 16, 7) - 1, plain_norms, "GroupNormalization"),
        (lambda: GEGLU(8, 12), drawn(3, 5, 8), cut_layers, "VariadicSplit"),
    ],
)
@torch.no_grad()
def test_the_same_in_other_operations(
    make: Callable[[], nn.Module], given: Tensor, change: Callable[[Any], None], gone: str
) -> None:
    torch.manual_seed(0)
    network = make().eval()
    model = read(network, (given,))
    before = types(model)
    change(model)
    assert gone in before and gone not in types(model)
    torch.testing.assert_close(answers(model, given)[0], network(given), atol=2e-6, rtol=1e-5)


class Chunks(nn.Module):
    """Cut along another axis, and what is no linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = (x + 1).chunk(2, dim=1)
        return one * other


def test_what_is_no_layer_stays_cut() -> None:
    given = drawn(2, 4, 3)
    model = read(Chunks(), (given,))
    cut_layers(model)
    assert "VariadicSplit" in types(model)
    torch.testing.assert_close(answers(model, given)[0], Chunks()(given))


class Phases(nn.Module):
    """Reads two of its three inputs, and one for its waves."""

    def forward(self, x: Tensor, unread: Tensor, t: Tensor) -> Tensor:
        return x * torch.cat([(1000 * t).sin(), (1000 * t).cos()], dim=1)


def test_waves_are_a_part_of_their_own_and_nobody_is_given_what_is_not_read() -> None:
    x, unread, t = drawn(3, 4), drawn(3, 9), drawn(3, 2)
    waves, rest = cut_waves(read(Phases(), (x, unread, t)))
    assert waves is not None and waves.reads == [2] and rest.reads == [0, 3, 4]
    assert not {"Sin", "Cos"} & types(rest.model)
    found = answers(waves.model, t)
    torch.testing.assert_close(answers(rest.model, x, *found)[0], Phases()(x, unread, t), atol=1e-5, rtol=1e-4)
