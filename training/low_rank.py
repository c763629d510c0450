"""A network whose layers learn differences of low rank to what they were (LoRA, Hu et al. 2021), and nothing else.

By torch's parametrizations: each weight is computed from what it was and two factors whenever it is read, so the
network is called, averaged and checkpointed as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gen.adapters.lora import layers_of
from gen.adapters.lora_names import DOWN, UP

Network = TypeVar("Network", bound=nn.Module)


class LoRADelta(nn.Module):
    """Adds up @ down to a weight; nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        flat = weight.detach().flatten(1)
        rank = min(rank, *flat.shape)
        self.up = nn.Parameter(flat.new_zeros(len(flat), rank))
        self.down = nn.Parameter(flat.new_empty(rank, flat.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """What a layer computes by."""
        return weight + (self.up @ self.down).view_as(weight)


def add_lora(unet: nn.Module, rank: int) -> None:
    """Let every layer of a UNet learn a difference of this rank, in place; all else learns nothing."""
    unet.requires_grad_(False)
    for _, layer in named_layers(unet):
        parametrize.register_parametrization(layer, "weight", LoRADelta(layer.weight, rank), unsafe=True)


@torch.no_grad()
def start_from(unet: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Begin with the differences of a LoRA in peft's layout, of the same ranks (`gen.adapters.lora.between`)."""
    for name, layer in named_layers(unet):
        difference = layer.get_submodule("parametrizations.weight.0")
        assert isinstance(difference, LoRADelta), "`add_lora` has been here"
        difference.up.copy_(factors[f"unet.{name}{UP[0]}"].flatten(1))
        difference.down.copy_(factors[f"unet.{name}{DOWN[0]}"].flatten(1))


@torch.no_grad()
def merge_lora(unet: Network) -> Network:
    """A copy whose weights are what its layers compute by.

    Not by torch's own `remove_parametrizations`, which takes a property from a class that copies share.
    """
    unet = copy.deepcopy(unet)
    for module in list(unet.modules()):
        if parametrize.is_parametrized(module, "weight"):
            weight = module.weight
            assert isinstance(weight, Tensor)
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            module.weight = nn.Parameter(weight)
    return unet


def named_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that a LoRA may be of, by their names."""
    return ((name, layer) for (_, name), layer in layers_of({"unet": unet}).items())
