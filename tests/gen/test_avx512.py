"""Our own attention for processors with AVX512-BF16: what float64 answers, as near as torch's, whoever is beside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gen import avx512
from gen.attention.kernels import KERNELS, Shape, chosen


def drawn(rows: int, heads: int, queries: int, keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (rows, heads, length, size) as projections make them."""
    rng = torch.Generator().manual_seed(size)
    made = [3 * torch.randn(rows, length, heads, size, generator=rng) for length in (queries, keys, keys)]
    query, key, value = (each.bfloat16().transpose(1, 2) for each in made)
    return query, key, value


def error(answer: Tensor, exact: Tensor) -> float:
    return ((answer - exact).norm() / exact.norm()).item()


@pytest.fixture(params=[True, False], ids=["AMX", "AVX512"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel as it is built for a processor with AMX, where this is one, and for one without."""
    has_tiles = avx512.abilities() >= avx512.TILES
    if request.param and not has_tiles:
        pytest.skip("no AMX")
    if not request.param:
        monkeypatch.setattr(avx512, "TILES", {"no such ability"})
    avx512.ready.cache_clear()
    try:
        avx512.library()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    yield
    monkeypatch.undo()
    avx512.ready.cache_clear()


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("size", [8, 16, 20, 40, 64, 80, 160])
@pytest.mark.parametrize("queries, keys", [(1, 1), (17, 33), (64, 64), (100, 77), (30, 300), (257, 600)])
def test_it_is_as_near_to_float64_as_torchs(size: int, queries: int, keys: int) -> None:
    query, key, value = drawn(2, 3, queries, keys, size)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.3)
    torchs = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    answer = avx512.attention(query, key, value, 0.3)
    assert answer.dtype == torch.bfloat16 and answer.shape == query.shape
    assert error(answer, exact) <= 1.15 * error(torchs, exact) + 1e-6


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("factor", [1e-30, 1e3, 1e15])
def test_scores_may_be_of_any_size(factor: float) -> None:
    query, key, value = drawn(1, 2, 20, 300, 16)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=factor)
    assert error(avx512.attention(query, key, value, factor), exact) < 5e-3


@pytest.mark.usefixtures("able")
def test_memory_may_lie_in_any_way() -> None:
    query, key, value = drawn(3, 2, 20, 40, 24)
    wanted = avx512.attention(query, key, value, 0.2)
    heads_first = (each.contiguous() for each in (query, key, value))
    assert torch.equal(avx512.attention(*heads_first, 0.2), wanted)
    values_apart = (each.mT.contiguous().mT for each in (query, key, value))
    assert torch.equal(avx512.attention(*values_apart, 0.2), wanted)
    shared = (each[:1].expand(3, -1, -1, -1) for each in (key, value))
    assert torch.equal(avx512.attention(query, *shared, 0.2)[:1], wanted[:1])


@pytest.mark.usefixtures("able")
def test_rows_are_alike_alone_and_by_any_number_of_threads() -> None:
    query, key, value = drawn(4, 3, 50, 70, 16)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(avx512.attention(query, key, value, 0.3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in pairwise(found))
    assert torch.equal(avx512.attention(query[2:3], key[2:3], value[2:3], 0.3), found[0][2:3])


@pytest.mark.usefixtures("able")
def test_torch_knows_it() -> None:
    torch.library.opcheck(avx512._attention, (*(each.requires_grad_() for each in drawn(1, 2, 5, 9, 8)), 0.3))


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("asking", [(True, True, True), (False, True, False)])
def test_gradients_are_torchs(asking: tuple[bool, ...]) -> None:
    found = []
    for attend in (avx512.attention, lambda *given: F.scaled_dot_product_attention(*given[:3], scale=given[3])):
        given = [each.requires_grad_(asked) for each, asked in zip(drawn(2, 2, 9, 13, 16), asking, strict=True)]
        attend(*given, 0.3).float().sum().backward()
        found.append([each.grad for each in given])
    for ours, torchs in zip(*found, strict=True):
        assert (ours is None and torchs is None) or torch.equal(ours, torchs)


@pytest.mark.usefixtures("able")
def test_auto_takes_it_for_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """And measures nothing, so that every process takes the same."""
    monkeypatch.setattr("gen.attention.kernels.seconds", None)
    cpu, sizes = torch.device("cpu"), {"heads": 8, "size": 12, "queries": 1024, "keys": 77}
    assert chosen("auto", Shape(cpu, torch.bfloat16, **sizes)) == "avx512"
    assert chosen("auto", Shape(cpu, torch.bfloat16, **{**sizes, "queries": 64})) == "sdpa"
    assert chosen("auto", Shape(cpu, torch.float32, **sizes)) == "sdpa"
    assert chosen("auto", Shape(cpu, torch.bfloat16, mask=(1, 1), **sizes)) == "sdpa"


def test_what_it_does_not_compute_is_refused() -> None:
    query, key, value = drawn(1, 1, 2, 3, 161)
    with pytest.raises(ValueError, match="heads of at most 160 values, not 161"):
        avx512.attention(query, key, value, 1.0)
    with pytest.raises(ValueError, match="it computes in bfloat16 on the CPU"):
        avx512.attention(query.float(), key.float(), value.float(), 1.0)
    with pytest.raises(ValueError, match="it takes no mask"):
        KERNELS["avx512"](query, key, value, torch.zeros(1, 1, 2, 3), 1.0)


def test_a_processor_without_it_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx512, "NEEDED", {"avx512_bf16", "no_such_flag"})
    with pytest.raises(RuntimeError, match="needs Linux and a processor with AVX512-BF16"):
        avx512.ready.__wrapped__()
