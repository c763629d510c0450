"""Our kernels in OpenVINO's models: what they can compute is replaced and answers the same, the rest stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen.openvino_kernels import operations, own_kernels
from gen.openvino_model import read

openvino = pytest.importorskip("openvino")
OURS, THEIRS = "AmxAttention", "ScaledDotProductAttention"


@pytest.fixture(autouse=True)
def able() -> None:
    if operations() is None:
        pytest.skip("its kernel cannot run here")


class Layer(nn.Module):
    """Attention to keys and values that are projected, or handed over with heads in front."""

    def __init__(self, turned: bool = True, **options: Any) -> None:
        super().__init__()
        self.turned, self.options = turned, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pair = [each.transpose(1, 2) if self.turned else each for each in (key, value)]
        return F.scaled_dot_product_attention(query.transpose(1, 2), *pair, **self.options).transpose(1, 2).flatten(2)


class Unturned(Layer):
    """Whose answer stays with heads in front."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().forward(query, key, value).unflatten(2, (query.shape[2], -1)).transpose(1, 2) * 2


def drawn(size: int, turned: bool) -> tuple[Tensor, ...]:
    """Queries (B, 20, 3, d), keys and values (B, 40, 3, d), or (B, 3, 40, d)."""
    rng = torch.Generator().manual_seed(size)
    query, *pair = (torch.randn(2, length, 3, size, generator=rng).bfloat16().float() for length in (20, 40, 40))
    return query, *(each if turned else each.transpose(1, 2).contiguous() for each in pair)


def changed(layer: nn.Module, given: tuple[Tensor, ...], threads: int = 1) -> Any:
    model = read(layer, given)
    model.reshape({place: list(each.shape) for place, each in enumerate(given)})
    own_kernels(model, threads)
    return model


def types(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


@torch.no_grad()
def error(model: Any, layer: nn.Module, given: tuple[Tensor, ...]) -> float:
    """How far the model is from its layer in float64, relative."""
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    (found,) = compiled([each.numpy() for each in given]).values()
    exact = layer.double()(*(each.double() for each in given))
    return ((torch.from_numpy(found) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_plain_attention_is_ours_and_answers_the_same(options: dict[str, Any], turned: bool, threads: int) -> None:
    layer, given = Layer(turned, **options), drawn(16, turned)
    model = changed(layer, given, threads)
    assert OURS in types(model) and not {THEIRS, "Transpose"} & set(types(model))
    assert error(model, layer, given) < 6e-3


@pytest.mark.parametrize(
    "layer, size",
    [(Layer(is_causal=True), 16), (Layer(attn_mask=torch.ones(20, 40)), 16), (Layer(), 161), (Unturned(), 16)],
)
def test_other_attention_stays(layer: nn.Module, size: int) -> None:
    kinds = types(changed(layer, drawn(size, turned=True)))
    assert (OURS in kinds, THEIRS in kinds) == ((True, False) if isinstance(layer, Unturned) else (False, True))


class Normed(nn.Module):
    """A group norm, and perhaps something behind it."""

    def __init__(self, channels: int, groups: int, behind: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm, self.behind = nn.GroupNorm(groups, channels), behind
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed if self.behind is None else self.behind(normed)


def twice(x: Tensor) -> Tensor:
    return F.silu(x) + x


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("behind", [None, F.silu, F.gelu, twice])
@pytest.mark.parametrize(
    "shape, groups", [((2, 64, 8, 8), 32), ((3, 40, 5, 7), 8), ((2, 24, 9), 4), ((5, 320, 4, 4), 32)]
)
def test_a_group_norm_is_ours_and_answers_the_same(
    groups: int, shape: tuple[int, ...], behind: Callable[[Tensor], Tensor] | None, threads: int
) -> None:
    """Also of values that lie far from zero: 20, with a deviation of 3."""
    layer = Normed(shape[1], groups, behind)
    x = (20 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    model = changed(layer, (x,), threads)
    kinds = types(model)
    assert "GroupNormLast" in kinds and "GroupNormalization" not in kinds
    assert ("Swish" in kinds) == (behind is twice), "a SiLU that alone reads the norm is computed with it"
    assert error(model, layer, (x,)) < 4e-3


def test_a_group_norm_of_fewer_rows_than_threads_stays() -> None:
    assert "GroupNormalization" in types(changed(Normed(8, 2), (torch.ones(1, 8, 4, 4),), threads=2))


def test_silu_far_from_zero_and_of_what_is_no_number() -> None:
    layer = Normed(32, 4, F.silu)
    nn.init.constant_(layer.norm.weight, 300.0)
    x = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    model = changed(layer, (x,))
    assert error(model, layer, (x,)) < 4e-3
    x[1, 0, 0, 0] = torch.nan
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    found = torch.from_numpy(next(iter(compiled([x.numpy()]).values())))
    assert found[1, :8].isnan().all() and not found[1, 8:].isnan().any() and not found[[0, 2]].isnan().any()


def test_a_group_norm_of_one_value_a_group_is_its_shift() -> None:
    layer = Normed(8, 8)
    x = torch.full((2, 8, 1, 1), 1e4)
    model = changed(layer, (x,))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    (found,) = compiled([x.numpy()]).values()
    assert torch.equal(torch.from_numpy(found)[0, :, 0, 0], layer.norm.bias.bfloat16().float())
