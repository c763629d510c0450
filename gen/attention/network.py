"""Our processors on the layers of a diffusers network, and what the network is then told of texts.

`set_attention` puts them there, `restore_attention` puts the former ones back. Where the caller says through
`cross_attention_kwargs` which text each evaluation reads (`reading`), a text is projected once for all layers that
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from clip_core.device import network_device
from gen.attention.kernels import AUTO, check_attention
from gen.attention.processor import STOCK, Processor, text_pair
from gen.attention.texts import TextCache, Texts
from gen.conditioning import Distinct

T = TypeVar("T")
FIRST_LAYER: WeakKeyDictionary[nn.Module, ref[Attention]] = WeakKeyDictionary()
"""Of each network that was asked; to look for it among all modules takes longer than a step's arithmetic"""


def set_attention(network: nn.Module, name: str = AUTO) -> None:
    """Let every Attention of a diffusers network compute with the kernel of this name (one of `CHOICES`).

    Raises ValueError for what `check_attention` refuses and for a network whose processors are not diffusers' plain
    ones. A kernel that runs there but not for some shape (flash and a mask on CUDA) leaves that shape to torch's own
    choice and logs why.
    """
    layers = list(attentions(network))
    check_attention(name, network_device(network), layers[0].to_q.weight.dtype if layers else torch.float32)
    for layer in layers:
        if not isinstance(layer.processor, (*STOCK, Processor)):
            kind = type(layer.processor).__name__
            raise ValueError(f"attention '{name}' would replace a {kind}, which does more; take that one out first")
    restore_attention(network)
    places, cache = count(), TextCache()
    down = getattr(network, "down_blocks", None)  # which compute in the order that they are listed in, and first
    first = None if down is None else next(attentions(down), None)
    for layer in layers:
        place = next(places) if layer.is_cross_attention else None
        is_first = layer is first and place is None
        layer.set_processor(Processor(name, layer.processor, place, cache, is_first))


def restore_attention(network: nn.Module) -> None:
    """Put every Attention's former processor back; one that is not ours stays."""
    for layer in attentions(network):
        if isinstance(layer.processor, Processor):
            layer.set_processor(layer.processor.former)


def attentions(network: nn.Module) -> Iterator[Attention]:
    """Every diffusers Attention in a network."""
    return (module for module in network.modules() if isinstance(module, Attention))


def adds_keys(network: nn.Module) -> bool:
    """Whether layers see the picture's keys beside the text's (Karlo, Kandinsky), so that rows cannot share these."""
    return any(layer.added_kv_proj_dim is not None for layer in attentions(network))


def text_layers(network: nn.Module) -> Iterator[Attention]:
    """Those of them that read the text, of a network with these processors."""
    return (layer for layer in attentions(network) if layer.processor.place is not None)


def reading(
    network: nn.Module,
    texts: Distinct[T],  # told apart by identity: token states, or conditions where other things are read as well
    states: Callable[[list[T]], Tensor],  # what the layers read of some of them, (U, L, D)
) -> dict[str, Texts] | None:
    """The network's `cross_attention_kwargs`: which text each evaluation reads, and its keys and values in every layer.

    A text that is new is projected here, not in the network's own call. None where `set_attention` was not called.
    """
    cache = text_cache_of(network)
    return None if cache is None else {"texts": cache.read(texts, lambda new: projected(network, states(new)))}


def seeing(
    network: nn.Module,
    pictures: Distinct[T],  # told apart by identity
    project: Callable[[list[T]], list[tuple[Tensor, ...]]],  # of some of them the pairs of each layer that reads text
) -> dict[str, Texts]:
    """The same for pictures that the layers see beside their text, by keys and values of their own (IP-Adapter)."""
    cache = text_cache_of(network)
    assert cache is not None, "asked of a network without these processors"
    return {"pictures": cache.read(pictures, project)}


def text_cache_of(network: nn.Module) -> TextCache | None:
    """What a network's processors keep; None where `set_attention` was not called."""
    known = FIRST_LAYER.get(network)
    first = None if known is None else known()
    if first is None:
        first = next(attentions(network), None)
        if first is None:
            return None
        FIRST_LAYER[network] = ref(first)
    return first.processor.text_cache if isinstance(first.processor, Processor) else None


@torch.no_grad()  # constants of the text, whatever else is differentiated
def projected(network: nn.Module, states: Tensor) -> list[tuple[Tensor, ...]]:
    """Keys and values (2, heads, L, d) of every text's states (U, L, D), of each layer that reads the text."""
    pairs = [torch.stack(text_pair(layer, states), 1) for layer in text_layers(network)]  # (U, 2, heads, L, d)
    return [tuple(of_layer[text] for of_layer in pairs) for text in range(len(states))]
