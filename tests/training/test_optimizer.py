"""Muon's steps are the orthogonal ones of its papers, on the matrices it is for, and state goes through unharmed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.optimizer import CombinedOptimizer, Muon, make_optimizer, newton_schulz
from training.recipe import TrainSection


def net() -> nn.Sequential:
    """A convolution from pixels, a hidden one ("1"), a norm, a hidden matrix ("4"), a narrow head."""
    torch.manual_seed(0)
    hidden = [nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.Flatten(), nn.Linear(24 * 16, 32)]
    return nn.Sequential(nn.Conv2d(3, 16, 1), *hidden, nn.Linear(32, 2))


def config(**changes: Any) -> TrainSection:
    fields: dict[str, Any] = {"steps": 1, "batch_size": 1, "learning_rate": 0.01, "optimizer": "muon"}
    return TrainSection(**{**fields, **changes})


def backward(network: nn.Module, seed: int) -> None:
    network.zero_grad()
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    network(x).square().mean().backward()


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


@pytest.mark.parametrize("shape", [(16, 16), (16, 70), (70, 16)])
def test_orthogonal_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    inner = (left @ right * found).sum(dim=(1, 2)) / found.norm(dim=(1, 2)) / (left @ right).norm(dim=(1, 2))
    assert (inner > 0.97).all()


def test_a_first_step_is_the_orthogonal_gradient_at_adamws_size() -> None:
    network = net()
    before = weights(network)
    rng = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(value.shape, generator=rng) for name, value in before.items()}
    for name, value in network.named_parameters():
        value.grad = gradients[name].clone()
    make_optimizer(network, config(weight_decay=0.5), fused=True).step()
    for name, columns in (("1.weight", 16 * 9), ("4.weight", 24 * 16)):
        update = newton_schulz(gradients[name].flatten(1)[None])[0].view_as(before[name])
        taken = before[name] * (1 - 0.01 * 0.5) - network.get_parameter(name)
        assert torch.cosine_similarity(taken.flatten(), update.flatten(), dim=0) > 0.99
        assert taken.norm().item() == pytest.approx(0.01 * 0.2 * columns**0.5 * update.norm().item(), rel=1e-2)
    assert (network[0].weight - before["0.weight"]).abs().max() > 0.009  # AdamW's first step is the rate itself


def test_muon_takes_matrices_that_are_wide_on_both_sides() -> None:
    network = net()
    optimizer = make_optimizer(network, config(), fused=True)
    assert isinstance(optimizer, CombinedOptimizer) and isinstance(optimizer.parts[0], Muon)
    taken = {id(parameter) for parameter in optimizer.parts[0].param_groups[0]["params"]}
    assert [name for name, value in network.named_parameters() if id(value) in taken] == ["1.weight", "4.weight"]
    all_groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(all_groups) == len({id(parameter) for parameter in all_groups}) == len(list(network.parameters()))
    assert isinstance(make_optimizer(network, config(optimizer="adamw"), fused=True), torch.optim.AdamW)


def test_frozen_parameters_are_left_out() -> None:
    network = net()
    network[1].requires_grad_(False)
    optimizer = make_optimizer(network, config(), fused=True)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert id(network[1].weight) not in held and id(network[4].weight) in held


def test_a_rate_set_from_outside_reaches_every_part_before_and_after_loading() -> None:
    network = net()
    optimizer = make_optimizer(network, config(), fused=True)
    backward(network, 0)
    optimizer.step()
    saved, kept = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network)
    backward(network, 1)
    optimizer.step()

    again = make_optimizer(kept, config(learning_rate=0.5), fused=True)
    again.load_state_dict(saved)
    backward(kept, 1)
    again.step()
    assert all(torch.equal(value, weights(kept)[name]) for name, value in weights(network).items())

    for group in again.param_groups:
        group["lr"] = 0.0
    before = weights(kept)
    backward(kept, 2)
    again.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(kept).items())


def test_it_learns() -> None:
    network = net()
    optimizer = make_optimizer(network, config(learning_rate=0.003), fused=True)
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = x.flatten(1)[:, :2] * x.flatten(1)[:, 2:4]
    losses = []
    for _ in range(150):
        loss = (network(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
