"""Our attention in OpenVINO's models: the plain ones are replaced and answer the same, the others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen.openvino_attention import operations, own_attention
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
    own_attention(model, threads)
    return model


def types(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_plain_attention_is_ours_and_answers_the_same(options: dict[str, Any], turned: bool, threads: int) -> None:
    layer, given = Layer(turned, **options), drawn(16, turned)
    model = changed(layer, given, threads)
    assert OURS in types(model) and not {THEIRS, "Transpose"} & set(types(model))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    del model
    (found,) = compiled([each.numpy() for each in given]).values()
    exact = layer(*given)
    assert ((torch.from_numpy(found) - exact).norm() / exact.norm()).item() < 6e-3


@pytest.mark.parametrize(
    "layer, size",
    [(Layer(is_causal=True), 16), (Layer(attn_mask=torch.ones(20, 40)), 16), (Layer(), 161), (Unturned(), 16)],
)
def test_other_attention_stays(layer: nn.Module, size: int) -> None:
    kinds = types(changed(layer, drawn(size, turned=True)))
    assert (OURS in kinds, THEIRS in kinds) == ((True, False) if isinstance(layer, Unturned) else (False, True))
