"""Whole loops beside stock schedulers, as benchmarks/schedulers.py runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UnCLIPScheduler, UniPCMultistepScheduler

from gen.scheduler import STOCK
from peers import PEERS, Peer, compare, network_of, our_run, stock_run
from report import RESULTS
from samplers.sample import SAMPLERS
from schedulers import table

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.sampler} {peer.config} {peer.asked}")
def test_whole_loops_equal_stock(peer: Peer) -> None:
    """Stock with its fault mended where it has one; and the mending tells, or it is not needed."""
    found = compare(peer)
    assert found.right <= peer.bound
    assert found.stock is None or found.stock > 5 * found.right


def test_every_sampler_has_a_peer() -> None:
    assert {peer.sampler for peer in PEERS} == set(STOCK) == set(SAMPLERS)


def test_the_table_is_the_one_measured() -> None:
    pairs = json.loads((RESULTS / "schedulers.json").read_text())["pairs"]
    assert table(pairs) in (DOCS / "schedulers.md").read_text()
    assert [pair["theirs"] for pair in pairs] == [peer.spelled["theirs"] for peer in PEERS]


# --- stock's faults ----------------------------------------------------------------------------------------------


def test_unipc_bh1_is_nan_in_stock_at_level_0() -> None:
    stock, network = UniPCMultistepScheduler(solver_type="bh1"), network_of("eps", DDIMScheduler().betas)
    assert our_run(stock, network, 10).isfinite().all() and stock_run(stock, network, 10).isnan().all()


def test_one_step_of_unclip_crashes_in_stock() -> None:
    stock = UnCLIPScheduler(prediction_type="sample", clip_sample=False)
    network = network_of("x0", stock.betas)
    with pytest.raises(ZeroDivisionError):
        stock_run(stock, network, 1)
    one = our_run(stock, network, 1)
    start = torch.stack([torch.randn(one.shape[1:], generator=torch.Generator().manual_seed(s)) for s in (0, 7)])
    # from the last level straight to the estimate
    assert torch.allclose(one[:2], network(start, 999), atol=1e-3)
