"""Networks that do not all fit a device at once: who is asked lies there, the others wait in host memory.

`Offload` moves weights and nothing else, and no pixel changes: the first layer of a network that is asked brings all of
it, and who was asked longest ago leaves where room is wanted. Weights never change on the device, so who leaves is not
copied back. Small weights stay, and by them a network says where it is. Nothing here knows rows, models or families.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition, get_ident
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen.bucket import UNBOUNDED, is_out_of_memory
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
    is_held: bool = False  # a gradient may still go back through it

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
            home = pinned(weight.data) if device.type == "cuda" else weight.data
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
        """Put other data in the place of some weights, which a gradient may go through whoever asks."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers:
                layer._apply(lambda tensor: moves[tensor](tensor) if tensor in moves else tensor, recurse=False)


class FetchHook:
    """Tells that a layer is about to compute, as a hook of it.

    It keeps nobody, or networks would keep each other; a copy of a layer tells nothing.
    """

    def __init__(self, offload: Offload, traveller: Traveller) -> None:
        self.offload, self.traveller = ref(offload), ref(traveller)

    def __call__(self, layer: nn.Module, given: object) -> None:
        """A layer's call is about to begin."""
        offload, traveller = self.offload(), self.traveller()
        if offload is not None and traveller is not None:
            offload.ask(traveller)

    def __deepcopy__(self, memo: object) -> Callable[[nn.Module, object], None]:
        return say_nothing


def say_nothing(layer: nn.Module, given: object) -> None:
    """A hook of a layer whose weights do not travel."""


class Turn:
    """A lock that is had in the order in which it was asked for, and again by who has it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None  # a thread
        self._depth = 0

    def __enter__(self) -> None:
        me, ticket = get_ident(), object()
        with self._changed:
            if self._owner != me:
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._owner is None and self._waiting[0] is ticket)
                finally:  # also on Ctrl-C
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
                self._owner = me
            self._depth += 1

    def __exit__(self, *raised: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()


@dataclass(eq=False)
class Offload:
    """Who of some networks is on a device; one thread at a time asks them (`turn`)."""

    networks: Sequence[nn.Module]
    device: torch.device
    most: int = 0  # bytes of weights there at once, but for who is alone
    travellers: list[Traveller] = field(default_factory=list)
    here: list[Traveller] = field(default_factory=list)  # who was asked longest ago first
    turn: Turn = field(default_factory=Turn)  # held by who asks them
    _hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def is_on(self) -> bool:
        """Whether anybody travels."""
        return bool(self._hooks)

    @property
    def could_leave(self) -> int:
        """Bytes on the device that others can have when memory is short: of all but the largest network."""
        if self.device.type != "cuda":
            return 0
        sizes = [each.num_bytes for each in (self.here if self.is_on else travellers_of(self.networks))]
        return sum(sizes) - max(sizes, default=0)

    def begin_on(self, device: torch.device) -> None:
        """Let networks that lie in host memory travel to a device.

        NoRoom, a ValueError, for one whose weights alone are more than the device has free.
        """
        self.device, free = device, free_memory(device)
        for each in travellers_of(self.networks):
            if free is not None and each.num_bytes > free:
                problem = f"{each.name} alone needs {each.num_bytes / 1e9:.1f} GB for its weights"
                raise NoRoom(f"{problem}, and {free / 1e9:.1f} GB are free on {device}; take a smaller dtype or model")
        self.begin()

    def begin(self) -> None:
        """Let them travel from here on, with their large weights where they lie."""
        self.travellers, device = travellers_of(self.networks), self.device
        for each in self.travellers:
            ask = FetchHook(self, each)
            self._hooks += [layer.register_forward_pre_hook(ask) for layer in each.layers]
        self.here = [each for each in self.travellers if any(weight.device == device for weight in each.weights)]
        free = free_memory(device)
        self.most = UNBOUNDED if free is None else int(SHARE * (free + sum(each.num_bytes for each in self.here)))
        for network in self.networks:
            stay(network, device)
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
            host = free_memory(torch.device("cpu"))
            if host is not None and host < sum(each.num_bytes for each in travellers_of(self.networks)):
                return False
            self.begin()
        return self.make_room()

    def make_room(self) -> bool:
        """Let everybody leave; False where nobody was there."""
        left = bool(self.here)
        while self.here:
            self.here.pop().leave()
        return left

    def ask(self, traveller: Traveller) -> None:
        """One of its layers is about to compute."""
        traveller.is_held = torch.is_grad_enabled()
        if self.here and self.here[-1] is traveller:
            return
        if traveller in self.here:
            self.here.remove(traveller)
        else:
            self._bring(traveller)
        self.here.append(traveller)

    def _bring(self, traveller: Traveller) -> None:
        wanted = traveller.num_bytes
        for other in self._free_to_leave():
            if wanted + sum(each.num_bytes for each in self.here) > self.most:
                self._leave(other)
        try:
            traveller.come(self.device)
        except Exception as error:
            others = self._free_to_leave()
            if not (is_out_of_memory(error) and others):
                raise
            for other in others:
                self._leave(other)
            traveller.come(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # weights are none of what a call takes

    def _free_to_leave(self) -> list[Traveller]:
        """Of those here, who was asked longest ago first; while gradients are recorded, without whom they need."""
        return [each for each in self.here if not (torch.is_grad_enabled() and each.is_held)]

    def _leave(self, traveller: Traveller) -> None:
        self.here.remove(traveller)
        traveller.leave()


def pinned(tensor: Tensor) -> Tensor:
    """In memory that a GPU copies from by itself, or where the system gives none, as it is."""
    try:
        return tensor if tensor.is_pinned() else tensor.pin_memory()
    except RuntimeError as error:
        logger.info("memory cannot be pinned (%s); copies are waited for", str(error).partition("\n")[0])
        return tensor


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
