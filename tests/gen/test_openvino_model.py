"""What is changed in a network as OpenVINO has read it: it computes the same, in other operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from gen.openvino_model import cut_layers, cut_levels, fold_norms, plain_norms, read
from gen.openvino_runtime import core

pytest.importorskip("openvino")


def answers(model: Any, *given: Tensor) -> list[Tensor]:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
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


class Levels(nn.Module):
    """Reads two of its three inputs, and one of these beside the picture for what follows from its level."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, (3, 5)))

    def forward(self, x: Tensor, unread: Tensor, t: Tensor) -> Tensor:
        waves = torch.cat([(1000 * t).sin(), (1000 * t).cos()], dim=1)
        return x * self.layer(waves)[:, :, None] + self.other(waves)


def test_what_follows_from_a_level_is_a_part_of_its_own_and_nobody_is_given_what_is_not_read() -> None:
    x, unread, t = drawn(3, 3, 5), drawn(3, 9), drawn(3, 2)
    network = Levels()
    levels, rest = cut_levels(read(network, (x, unread, t)), [1, 2])
    assert levels is not None and levels.reads == [2] and rest.reads == [0, 3]
    assert {"Sin", "Cos", "MatMul"} <= types(levels.model) and not {"Sin", "Cos", "MatMul"} & types(rest.model)
    (found,) = answers(levels.model, t)
    assert len(rest.model.inputs) == 2, "what the levels say is handed over side by side"
    torch.testing.assert_close(answers(rest.model, x, found)[0], network(x, unread, t), atol=1e-5, rtol=1e-4)


def test_a_network_without_a_level_is_one_part() -> None:
    levels, rest = cut_levels(read(nn.Linear(4, 3), (drawn(2, 4),)), [])
    assert levels is None and rest.reads == [0]


class Normed(nn.Module):
    """Layers behind a norm, with a bias and without, and a norm that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(6), nn.LayerNorm(6)
        self.one, self.other, self.last = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Linear(6, 5)
        for norm in (self.first, self.second):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        return self.one(first) * self.other(first) + self.last(second) * second.sum(-1, keepdim=True)


@torch.no_grad()
def test_a_norms_scale_and_shift_are_the_layers_behind_it() -> None:
    network, x = Normed(), drawn(2, 4, 6)
    model = read(network, (x,))
    before = len(model.get_ops())
    fold_norms(model)
    assert len(model.get_ops()) < before
    torch.testing.assert_close(answers(model, x)[0], network(x), atol=1e-5, rtol=1e-5)
    constants = [node.get_data() for node in model.get_ops() if node.get_type_name() == "Constant"]

    def stays(norm: nn.LayerNorm) -> bool:
        return any(np.array_equal(each.ravel(), norm.bias.numpy()) for each in constants)

    assert not stays(network.first) and stays(network.second), "something else reads the second"


class Table(nn.Module):
    """A constant of another shape than a bias behind a layer without one, and a norm over two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.layer = nn.LayerNorm(6), nn.LayerNorm([4, 6]), nn.Linear(6, 5, bias=False)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.both.weight)
        self.table = nn.Parameter(drawn(1, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x)) + self.table + self.layer(self.both(x))


@torch.no_grad()
def test_what_is_no_bias_and_no_layer_norm_is_computed_as_it_is() -> None:
    network, x = Table(), drawn(2, 4, 6)
    model = read(network, (x,))
    fold_norms(model)
    torch.testing.assert_close(answers(model, x)[0], network(x), atol=1e-5, rtol=1e-5)
