"""Layers that learn differences of low rank: nothing at first, then what a LoRA of that rank can say."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gen.adapters import lora
from training import low_rank

RANK = 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6 * 16, 5))


def moved(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return other


def test_at_first_it_is_the_network_and_layers_alone_learn() -> None:
    net, x = network(), torch.randn(2, 3, 4, 4)
    before = net(x)
    low_rank.add_lora(net, RANK)
    assert torch.equal(net(x), before)
    net(x).square().mean().backward()
    learning = [name for name, weight in net.named_parameters() if weight.requires_grad]
    assert learning == [f"{layer}.parametrizations.weight.0.{which}" for layer in (0, 3) for which in ("up", "down")]
    assert all(weight.grad is not None for weight in net.parameters() if weight.requires_grad)


@torch.no_grad()
def test_it_starts_from_the_nearest_lora_and_is_plain_again() -> None:
    base, x = network(), torch.randn(2, 3, 4, 4)
    other = moved(base)
    for rank in (RANK, 100):
        net = copy.deepcopy(base)
        low_rank.add_lora(net, rank)
        factors = lora.between(base, other, rank)
        low_rank.start_from(net, factors)
        average = AveragedModel(net)  # is copied, as training copies it
        plain = low_rank.merge_lora(average.module)
        assert {name for name, _ in plain.named_parameters()} == {name for name, _ in base.named_parameters()}
        torch.testing.assert_close(plain(x), net(x))
        difference = (plain[0].weight - base[0].weight).flatten(1)
        assert torch.linalg.matrix_rank(difference, tol=1e-5) == min(rank, 6)
    torch.testing.assert_close(plain[3].weight, other[3].weight, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain[3].bias, base[3].bias), "of full rank, but for what is no layer's weight"


def test_what_learns_nothing_of_low_rank_is_plain_already() -> None:
    net = network()
    for one, other in zip(low_rank.merge_lora(net).parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other) and one is not other
