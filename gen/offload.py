"""Networks that do not all fit a device at once: who is asked lies there, the others wait in host memory.

`Offload` moves weights and nothing else, and no pixel changes: the first layer of a network that is asked brings all of
it, and who was asked longest ago leaves where room is wanted. Weights never change on the device, so who leaves is not
copied back. Small weights stay, and by them a network says where it is. Nothing here knows rows, models or families.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen.bucket import is_out_of_memory
from gen.memory import free_memory
from gen.room import NoRoom

logger = logging.getLogger(__name__)

# Numbers of a weight that is worth its way. A model's first layers have fewer, by which it knows where it is.
LEAST = 1 << 18
SHARE = 0.5  # of a device's memory that weights may take; the rest is for what is computed by them


@dataclass(eq=False)
class Traveller:
    """A network's large weights, which come and go together."""

    name: str  # for errors
    layers: list[nn.Module]  # that have them
    homes: dict[Tensor, Tensor] = field(default_factory=dict)  # where those that are on the device came from

    @property
    def weights(self) -> list[nn.Parameter]:
        """As they are now; a layer may have been given others."""
        return list(dict.fromkeys(weight for layer in self.layers for weight in large(layer)))

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(weight.nbytes for weight in self.weights)

    def come(self, device: torch.device) -> None:
        """Lie on the device; where its memory does not do, nothing has come."""

        def fetched(weight: Tensor) -> Tensor:
            if weight in self.homes:  # of two layers
                return weight
            home = weight.data
            if device.type == "cuda" and not home.is_pinned():
                home = home.pin_memory()  # copied without waiting, now and whenever it comes again
            there = home.to(device, non_blocking=True)
            self.homes[weight] = home
            return there

        try:
            self._put({weight: fetched for weight in self.weights if weight.device != device})
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Lie in host memory; whoever still computes with what was on the device keeps that."""
        self._put({weight: lambda weight: self.homes.pop(weight, weight.data).cpu() for weight in self.weights})
        self.homes.clear()

    def _put(self, moves: Mapping[Tensor, Callable[[Tensor], Tensor]]) -> None:
        """Put other data in the place of some weights."""
        for layer in self.layers:
            layer._apply(lambda tensor: moves[tensor](tensor) if tensor in moves else tensor, recurse=False)


@dataclass(eq=False)
class Offload:
    """Who of some networks is on a device; one thread asks them."""

    networks: Sequence[nn.Module]
    device: torch.device
    most: int = 0  # bytes of weights there at once, but for who is alone
    here: list[Traveller] = field(default_factory=list)  # who was asked longest ago first
    _hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def is_on(self) -> bool:
        """Whether anybody travels."""
        return bool(self._hooks)

    def begin(self) -> None:
        """Let them travel from here on, with their large weights where they lie.

        NoRoom, a ValueError, for one whose weights alone are more than the device has free with all others away.
        """
        travellers, device = travellers_of(self.networks), self.device
        self.here = [each for each in travellers if any(weight.device == device for weight in each.weights)]
        free = free_memory(device)
        if free is not None:
            room = free + sum(each.num_bytes for each in self.here)
            self.most = int(SHARE * room)
            for traveller in travellers:
                if traveller.num_bytes > room:
                    told = f"{traveller.name} alone needs {traveller.num_bytes / 1e9:.1f} GB for its weights"
                    raise NoRoom(f"{told}, and {room / 1e9:.1f} GB are free on {device}; take a smaller dtype or model")
        for network in self.networks:
            stay(network, device)
        for traveller in travellers:
            ask = partial(self._asked, traveller)
            self._hooks += [layer.register_forward_pre_hook(ask) for layer in traveller.layers]
        logger.warning("networks do not all fit on %s at once; who is not asked waits in host memory", device)

    def end(self) -> bool:
        """Bring everybody home, and let nobody travel any more; whether anybody did."""
        was_on = self.is_on
        self.make_room()
        while self._hooks:
            self._hooks.pop().remove()
        return was_on

    def relieve(self) -> bool:
        """Have everybody leave a GPU's memory, to come back when asked; False where that helps nobody."""
        if self.device.type != "cuda":
            return False
        if not self.is_on:
            self.begin()
        return self.make_room()

    def make_room(self) -> bool:
        """Let everybody leave; False where nobody was there."""
        left = bool(self.here)
        while self.here:
            self.here.pop().leave()
        return left

    def _asked(self, traveller: Traveller, *call: object) -> None:
        """A layer is about to compute."""
        if self.here and self.here[-1] is traveller:
            return
        if traveller in self.here:
            self.here.remove(traveller)
        else:
            self._bring(traveller)
        self.here.append(traveller)

    def _bring(self, traveller: Traveller) -> None:
        wanted = traveller.num_bytes
        # what a gradient goes back through has to stay
        may_leave = not torch.is_grad_enabled()
        while may_leave and self.here and wanted + sum(each.num_bytes for each in self.here) > self.most:
            self.here.pop(0).leave()
        try:
            traveller.come(self.device)
        except Exception as error:
            if not (is_out_of_memory(error) and may_leave and self.make_room()):
                raise
            traveller.come(self.device)


def travellers_of(networks: Iterable[nn.Module]) -> list[Traveller]:
    """Those of networks that have large weights; a layer that several have travels with the first."""
    found: list[Traveller] = []
    seen = set[nn.Module]()
    for network in networks:
        layers = [layer for layer in network.modules() if layer not in seen and next(large(layer), None) is not None]
        seen.update(layers)
        if layers:
            found.append(Traveller(type(network).__name__, layers))
    return found


def large(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The large weights that a layer itself has."""
    return (weight for weight in layer.parameters(recurse=False) if weight.numel() >= LEAST)


def stay(network: nn.Module, device: torch.device) -> None:
    """Put all that does not travel on the device: small weights, and buffers."""

    def there(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) and tensor.numel() >= LEAST else tensor.to(device)

    network._apply(there)
