"""Our kernels in OpenVINO's models: what they can compute is replaced and answers the same, the rest stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from gen.attention.network import set_attention
from gen.openvino_convolution import by_tiles, side_of
from gen.openvino_kernels import operations, own_kernels
from gen.openvino_model import cut_layers, drop_ones, fold, fold_norms, read
from gen.openvino_runtime import Answering, core
from gen.openvino_weights import WeightCache
from gen.traced import Call

openvino = pytest.importorskip("openvino")
TILES = operations() is not None and by_tiles(openvino.Type.bf16)  # whether AMX multiplies bfloat16
OURS, THEIRS = "TileAttention", "ScaledDotProductAttention"


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


def changed(layer: nn.Module, given: tuple[Tensor, ...], threads: int = 1, precision: str = "bf16") -> Any:
    model = read(layer, given)
    for change in (drop_ones, cut_layers, fold_norms):
        change(model)
    model.reshape({place: list(each.shape) for place, each in enumerate(given)})
    own_kernels(model, threads, getattr(openvino.Type, precision), WeightCache())
    return model


def types(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


@torch.no_grad()
def error(model: Any, layer: nn.Module, given: tuple[Tensor, ...], precision: str = "bf16") -> float:
    """How far the model is from its layer in float64, relative."""
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
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


@pytest.mark.parametrize("precision, most", [("f32", 3e-6), ("bf16", 4e-3)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("behind", [None, F.silu, F.gelu, twice])
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 64, 8, 8), 32),
        ((3, 40, 5, 7), 8),
        ((2, 24, 9), 4),
        ((5, 320, 4, 4), 32),
        ((2, 16, 6, 6), 4),
        ((2, 8, 6), 8),
    ],
)
def test_a_group_norm_is_ours_and_answers_the_same(
    groups: int,
    shape: tuple[int, ...],
    behind: Callable[[Tensor], Tensor] | None,
    threads: int,
    precision: str,
    most: float,
) -> None:
    """Also of values that lie far from zero: 20, with a deviation of 3."""
    layer = Normed(shape[1], groups, behind)
    x = (20 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    model = changed(layer, (x,), threads, precision)
    kinds = types(model)
    assert "GroupNormLast" in kinds and "GroupNormalization" not in kinds
    assert ("Swish" in kinds) == (behind is twice), "a SiLU that alone reads the norm is computed with it"
    assert error(model, layer, (x,), precision) < most


def test_a_group_norm_of_fewer_rows_than_threads_stays() -> None:
    assert "GroupNormalization" in types(changed(Normed(8, 2), (torch.ones(1, 8, 4, 4),), threads=2))


@pytest.mark.parametrize("precision, most", [("f32", 2e-6), ("bf16", 4e-3)])
def test_silu_far_from_zero_and_of_what_is_no_number(precision: str, most: float) -> None:
    layer = Normed(32, 4, F.silu)
    nn.init.constant_(layer.norm.weight, 300.0)
    x = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    model = changed(layer, (x,), precision=precision)
    assert error(model, layer, (x,), precision) < most
    x[1, 0, 0, 0] = torch.nan
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found = torch.from_numpy(next(iter(compiled([x.numpy()]).values())))
    assert found[1, :8].isnan().all() and not found[1, 8:].isnan().any() and not found[[0, 2]].isnan().any()


def test_a_group_norm_of_one_value_a_group_is_its_shift() -> None:
    layer = Normed(8, 8)
    x = torch.full((2, 8, 1, 1), 1e4)
    model = changed(layer, (x,))
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    (found,) = compiled([x.numpy()]).values()
    assert torch.equal(torch.from_numpy(found)[0, :, 0, 0], layer.norm.bias.bfloat16().float())


class Tokens(nn.Module):
    """Linear layers of a transformer's block, each way that one can stand."""

    def __init__(self, width: int, answers: int, **options: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if options.get("normed") else nn.Identity()
        plain = nn.Linear(width, answers, options.get("bias", True))
        active = nn.Sequential(plain, nn.GELU()) if options.get("active") else plain
        self.layer = GEGLU(width, answers) if options.get("gated") else active
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        answer: Tensor = self.layer(self.norm(x))
        return sum(beside, answer)


def rounded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16().float()


@pytest.mark.parametrize("precision, most", [("f32", 1e-6), ("bf16", 6e-3)])
@pytest.mark.parametrize("rows", [(2, 64), (1, 5), (3, 7, 9), (70,)])  # also such as fill no tile
@pytest.mark.parametrize("width, answers", [(32, 16), (160, 48), (128, 128)])
@pytest.mark.parametrize(
    "options, has_beside",
    [
        ({}, False),
        ({}, True),
        ({"bias": False}, True),
        ({"normed": True}, False),
        ({"normed": True, "active": True}, False),
        ({"normed": True, "gated": True}, False),
    ],
)
def test_a_linear_layer_is_ours_with_what_stands_around_it(
    rows: tuple[int, ...],
    width: int,
    answers: int,
    options: dict[str, bool],
    has_beside: bool,
    precision: str,
    most: float,
) -> None:
    torch.manual_seed(0)
    layer = Tokens(width, answers, **options)
    given = (rounded(*rows, width), *([rounded(*rows, answers)] if has_beside else []))
    model = changed(layer, given, precision=precision)
    kinds = types(model)
    assert kinds.count("TileLinear") == 1 and not {"MatMul", "MVN", "Gelu", "Multiply", "Add"} & set(kinds)
    assert error(model, layer, given, precision) < most


@pytest.mark.parametrize("width, answers, threads", [(40, 16, 1), (32, 24, 1), (32, 16, 2)])
def test_other_linear_layers_stay(width: int, answers: int, threads: int) -> None:
    assert "TileLinear" not in types(changed(Tokens(width, answers), (rounded(2, 8, width),), threads))


def test_a_layer_with_an_activation_behind_it_stays_and_one_that_two_read_is_ours() -> None:
    active = changed(nn.Sequential(nn.Linear(32, 32), nn.SiLU()), (rounded(2, 8, 32),))
    assert "TileLinear" not in types(active)

    class Twice(Tokens):
        def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
            answer = self.layer(x)
            return answer + beside[0] * answer

    given = (rounded(2, 8, 32), rounded(2, 8, 32))
    layer = Twice(32, 32)
    model = changed(layer, given)
    assert "TileLinear" in types(model) and error(model, layer, given) < 6e-3


class Odd(nn.Module):
    """Layers beside what looks like their norm, bias, sum or activation, and is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.other = kind, nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.both = nn.LayerNorm([32, 32], elementwise_affine=False)
        self.rows = nn.Parameter(rounded(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "a number for each row":
            return self.layer(x) + self.rows
        if self.kind == "a norm over rows":
            return self.layer(self.both(x))
        if self.kind == "another GELU":
            return F.gelu(self.other(x), approximate="tanh")
        if self.kind == "a sum of one row":
            return self.other(x) + x.mean(1, keepdim=True)
        if self.kind == "another layer's answer":
            return self.layer(x) + self.other(x)
        if self.kind == "GELU that two read":
            active = F.gelu(self.other(x))
            return self.layer(active) * active
        if self.kind == "OpenAI's GELU":
            answer = self.other(x)
            return answer * torch.sigmoid(1.702 * answer)
        query, key, value = (
            layer(x).view(2, 64, 2, 8).transpose(1, 2) for layer in (self.layer, self.other, self.layer)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 32, 32)


@pytest.mark.parametrize(
    "kind, ours",
    [
        ("a number for each row", 1),
        ("a norm over rows", 1),
        ("another GELU", 0),
        ("a sum of one row", 1),
        ("another layer's answer", 2),
        ("GELU that two read", 2),
        ("OpenAI's GELU", 0),
        ("heads across rows", 2),
    ],
)
@torch.no_grad()
def test_what_only_looks_like_a_part_of_a_layer_is_computed_as_it_is(kind: str, ours: int) -> None:
    torch.manual_seed(0)
    layer, x = Odd(kind), rounded(2, 32, 32)
    model = changed(layer, (x,))
    assert types(model).count("TileLinear") == ours and "TileFeedForward" not in types(model)
    assert error(model, layer, (x,)) < 1e-2


@pytest.mark.parametrize("precision, most", [("f32", 1e-6), ("bf16", 4e-3)])
def test_gelu_far_from_zero_and_of_what_is_no_number(precision: str, most: float) -> None:
    """Values of one, gates that are the input: GEGLU is GELU."""
    layer = GEGLU(32, 32)
    nn.init.zeros_(layer.proj.weight)
    nn.init.zeros_(layer.proj.bias)
    with torch.no_grad():
        layer.proj.bias[:32] = 1
        layer.proj.weight[32:] = torch.eye(32)
    x = torch.linspace(-12, 12, 64 * 32).reshape(64, 32).bfloat16().float()
    model = changed(layer, (x,), precision=precision)
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    assert "TileLinear" in types(model)
    (found,) = compiled([x.numpy()]).values()
    torch.testing.assert_close(torch.from_numpy(found), F.gelu(x.double()).float(), atol=most / 4, rtol=most)
    x[3, 5] = torch.nan
    (found,) = compiled([x.numpy()]).values()
    spoilt = torch.from_numpy(found).isnan()
    assert spoilt[3].all() and spoilt.sum() == 32


@pytest.mark.parametrize("precision, most", [("f32", 2e-6), ("bf16", 8e-3)])
@pytest.mark.parametrize("rows", [(2, 64), (1, 5), (70,)])
@pytest.mark.parametrize("width, between, answers", [(32, 96, 16), (128, 512, 128)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("has_beside", [True, False])
def test_a_feed_forward_network_is_one(
    rows: tuple[int, ...],
    width: int,
    between: int,
    answers: int,
    gated: bool,
    has_beside: bool,
    precision: str,
    most: float,
) -> None:
    torch.manual_seed(0)
    first = Tokens(width, between, normed=True, **{"gated" if gated else "active": True})
    layer = Two(first, nn.Linear(between, answers))
    given = (rounded(*rows, width), *([rounded(*rows, answers)] if has_beside else []))
    model = changed(layer, given, precision=precision)
    kinds = types(model)
    assert "TileFeedForward" in kinds and not {"TileLinear", "MatMul", "MVN", "Gelu", "Multiply", "Add"} & set(kinds)
    assert error(model, layer, given, precision) < most


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        return sum(beside, self.second(self.first(x)))


class Block(nn.Module):
    """A transformer's block whose every part is ours."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(width, heads, width // heads)
        set_attention(self.block)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.block(x)
        return answer


@torch.no_grad()
def test_what_one_of_ours_answers_another_reads_as_it_is() -> None:
    torch.manual_seed(0)
    layer, x = Block(64, 4).eval(), rounded(3, 20, 64)
    model = changed(layer, (x,))
    kinds = types(model)
    assert kinds.count("TileLinear") == 2, "queries, keys and values are one; their answer"
    assert kinds.count("TileFeedForward") == 1, "GEGLU and what is behind it"
    assert kinds.count("TileAttention") == 1 and not {"MatMul", "MVN", "Add", "Transpose"} & set(kinds)
    computed = [node for node in model.get_ops() if node.get_type_name() == "Convert"]
    assert len([node for node in computed if node.input_value(0).get_node().get_type_name() != "Constant"]) == 2
    assert error(model, layer, (x,)) < 6e-3


# --- convolutions ------------------------------------------------------------------------------------------------

WINOGRAD = "WinogradConvolution"


class Convolved(nn.Module):
    """A convolution and what is added to its answer, in this order: one number for all places, or a picture."""

    def __init__(self, inside: int, outside: int, added: str = "", **options: Any) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inside, outside, **({"kernel_size": 3, "padding": 1} | options))
        self.added = added

    def forward(self, x: Tensor, per_channel: Tensor, beside: Tensor) -> Tensor:
        answer: Tensor = self.convolution(x)
        for each in self.added:
            answer = {"t": per_channel[:, :, None, None], "b": beside}[each] + answer
        return answer


def shown(inside: int, outside: int, rows: int, height: int, width: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(inside)
    shapes = [(rows, inside, height, width), (rows, outside), (rows, outside, height, width)]
    return tuple(torch.randn(shape, generator=rng).bfloat16().float() for shape in shapes)


# What convolutions are off by, in bfloat16 by tiles or by whole numbers, some with small patches.
ROUNDED = {"f32": 1e-6, "bf16": 8e-3 if TILES else 5e-3}


@pytest.mark.parametrize("precision, most", ROUNDED.items())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("added", ["", "t", "b", "tb", "bt"])
@pytest.mark.parametrize(
    "shape", [(32, 64, 5, 8, 8), (96, 32, 6, 5, 7), (64, 32, 6, 9, 11), (64, 64, 17, 4, 4), (32, 32, 70, 1, 1)]
)
def test_a_convolution_is_ours_and_answers_the_same(
    shape: tuple[int, ...], added: str, threads: int, precision: str, most: float
) -> None:
    """At the edges too, whose sizes may be odd."""
    layer, given = Convolved(*shape[:2], added), shown(*shape)
    model = changed(layer, given, threads, precision)
    assert WINOGRAD in types(model) and not {"Convolution", "Add"} & set(types(model))
    assert error(model, layer, given, precision) < most


@pytest.mark.parametrize(
    "shape, threads, precision, side",
    [
        ((4, 64, 8, 8), 1, "f32", 4),
        ((4, 64, 8, 8), 2, "f32", 2),  # a thread would have no patch
        ((1, 64, 8, 8), 2, "f32", None),
        ((16, 64, 5, 5), 1, "f32", 2),  # most of what is computed would be thrown away
        ((16, 64, 9, 11), 1, "f32", 4),
        ((4, 64, 8, 8), 1, "bf16", 2 if TILES else 4),  # whose rounding AMX's would multiply
    ],
)
def test_patches_are_as_large_as_takes_fewest_products(
    shape: tuple[int, ...], threads: int, precision: str, side: int | None
) -> None:
    assert side_of(shape, 64, threads, getattr(openvino.Type, precision)) == side


@pytest.mark.skipif(TILES, reason="AMX multiplies bfloat16 alone")
@pytest.mark.parametrize("inside", [32, 96, 512])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_whole_numbers_keep_within_their_bits(inside: int, scale: float) -> None:
    """Where all channels say the same, sums of products are as large as norms allow."""
    layer = Convolved(inside, 32)
    with torch.no_grad():
        layer.convolution.weight[:] = torch.randn(32, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        layer.convolution.bias.zero_()  # type: ignore[union-attr]
    given = tuple(torch.full_like(each, scale) for each in shown(inside, 32, 4, 8, 8))
    model = changed(layer, given)
    assert WINOGRAD in types(model) and error(model, layer, given) < 4e-3


@pytest.mark.skipif(TILES, reason="AMX multiplies bfloat16 alone")
def test_whole_numbers_round_hardly_more_than_the_answer() -> None:
    """A picture of zeros is zeros, and one with a number that is none has none in its own patches alone."""
    layer, given = Convolved(64, 64), shown(64, 64, 4, 8, 8)
    model = changed(layer, given)
    assert error(model, layer, given) < 2.2e-3
    given[0][1] = 0
    given[0][2, 5, 3, 3] = torch.nan
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    answer = torch.from_numpy(next(iter(compiled([each.numpy() for each in given]).values())))
    assert answer[2, :, 3, 3].isnan().all() and not answer[[0, 1, 3]].isnan().any()
    bias = layer.convolution.bias
    assert bias is not None and torch.allclose(answer[1], bias[:, None, None].expand_as(answer[1]).float(), atol=1e-2)


def test_filters_of_many_channels_take_less_room() -> None:
    shape = (4, 1280, 16, 16)
    assert [side_of(shape, inside, 1, openvino.Type.f32) for inside in (320, 1280)] == [4, 2]


def test_what_is_added_twice_is_added_by_openvino() -> None:
    layer, given = Convolved(32, 32, "bb"), shown(32, 32, 8, 4, 4)
    model = changed(layer, given, precision="f32")
    assert WINOGRAD in types(model) and types(model).count("Add") == 1
    assert error(model, layer, given, "f32") < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "padding": 0},
        {"padding": 0},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"padding": 2},
    ],
)
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    layer = Convolved(64, 64, **options)
    assert WINOGRAD not in types(changed(layer, shown(64, 64, 4, 8, 8), precision="f32"))


@pytest.mark.parametrize("threads, rows, is_ours", [(1, 1, False), (1, 2, True), (2, 3, False), (2, 4, True)])
def test_pictures_that_are_too_few_for_the_threads_stay(threads: int, rows: int, is_ours: bool) -> None:
    model = changed(Convolved(32, 32), shown(32, 32, rows, 8, 8), threads)
    assert (WINOGRAD in types(model)) == is_ours


@pytest.mark.parametrize("inside, outside", [(4, 32), (32, 4), (48, 32)])
def test_other_numbers_of_channels_stay(inside: int, outside: int) -> None:
    assert WINOGRAD not in types(changed(Convolved(inside, outside), shown(inside, outside, 4, 8, 8)))


def test_a_picture_is_alike_alone_and_beside_others() -> None:
    layer, given = Convolved(32, 32, "b"), shown(32, 32, 19, 12, 12)
    answers = []
    for rows in (slice(None), slice(7, 9)):
        some = tuple(each[rows] for each in given)
        model = changed(layer, some)
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        answers.append(next(iter(compiled([each.numpy() for each in some]).values())))
    assert (answers[0][7:9] == answers[1]).all()


# --- weights -----------------------------------------------------------------------------------------------------


class Both(nn.Module):
    """A convolution, then attention whose queries, keys and values are layers of one input, then GEGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(32, 64, 3, padding=1)
        self.queries, self.keys, self.values = (nn.Linear(64, 64) for _ in range(3))
        self.gated = GEGLU(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        states = self.convolution(x).flatten(2).transpose(1, 2)  # (B, places, 64)
        heads = [
            layer(states).unflatten(2, (2, 32)).transpose(1, 2) for layer in (self.queries, self.keys, self.values)
        ]
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        answer: Tensor = self.gated(seen)
        return answer


@pytest.mark.parametrize("precision, most", [("f32", 1e-6), ("bf16", 2e-2)])
def test_weights_are_laid_out_once_for_all_sizes(precision: str, most: float) -> None:
    layer, x = Both(), torch.randn(16, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = read(layer, (x,))
    cut_layers(plain)
    cache, made = WeightCache(), []
    for rows in (16, 4):
        model = plain.clone()
        model.reshape({0: [rows, 32, 8, 8]})
        own_kernels(model, 1, getattr(openvino.Type, precision), cache)
        made.append({place: weights.numbers for place, (_, weights) in cache.made.items()})
        assert error(model, layer.float(), (x[:rows],), precision) < most
    assert made[0] and made[0].keys() == made[1].keys()
    assert all(made[0][place] is made[1][place] for place in made[0])


def test_weights_of_another_network_are_its_own() -> None:
    """Although it was read when the first had gone, and may lie where that lay."""
    cache, given = WeightCache(), shown(32, 32, 4, 8, 8)[:1]
    for _ in range(4):
        layer = nn.Conv2d(32, 32, 3, padding=1)
        model = read(layer, given)
        model.reshape({0: list(given[0].shape)})
        own_kernels(model, 1, openvino.Type.f32, cache)
        assert error(model, layer, given, "f32") < 1e-6
        del model, layer


class Cut(nn.Module):
    """A layer whose weight is a part of another, as torch's own attention to something else has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.split([32, 64])[1])


def test_weights_that_are_worked_out_are_the_same_for_all_sizes() -> None:
    layer, x = Cut(), torch.randn(8, 32)
    plain, cache = read(layer, (x,)), WeightCache()
    fold(plain)
    for rows in (8, 4):
        model = plain.clone()
        model.reshape({0: [rows, 32]})
        own_kernels(model, 1, openvino.Type.f32, cache)
        assert error(model, layer.float(), (x[:rows],), "f32") < 1e-6
    assert len(cache.made) == 1


@torch.no_grad()
def test_pictures_of_another_size_are_computed_by_the_same_weights() -> None:
    layer, made = nn.Conv2d(32, 64, 3, padding=1), []
    answering = Answering(layer, "f32")
    for side in (8, 12):
        x = torch.randn(16, 32, side, side)
        torch.testing.assert_close(answering(Call.of((x,), {})), layer(x), atol=1e-5, rtol=1e-5)
        made.append([weights.numbers for _, weights in answering.weights.made.values()])
    assert len(answering.read) == 2 and len(made[0]) == 1
    assert len(made[1]) == 1 and made[1][0] is made[0][0]
