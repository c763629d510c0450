"""Attention that reaches the UNet: one switch for its kernel, and the prompt's keys and values computed once.

`set_attention` puts a processor of ours on every `Attention` of a diffusers network (diffusers' own
`set_attention_backend` does not reach a UNet's processors), `restore_attention` puts the former ones back; the
network itself is never touched. What a processor computes is what diffusers' AttnProcessor2_0 and
AttnAddedKVProcessor2_0 compute. Where the caller says through `cross_attention_kwargs` which text each evaluation
reads (`reading`), keys and values of a text are computed once per layer, outside the network's call, kept for as
long as that text's tokens live, and read by all its candidates without a copy for each. Nothing here knows rows,
samplers or families.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import count, groupby
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
    XFormersAttnAddedKVProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from clip_core.device import place_of
from gen import avx512
from gen.conditioning import Distinct

logger = logging.getLogger(__name__)

# What ours stands in for. Others carry weights or do more (IP-Adapter, PAG, ...) and are not replaced.
STOCK = (
    AttnProcessor,
    AttnProcessor2_0,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    SlicedAttnProcessor,
    SlicedAttnAddedKVProcessor,
    XFormersAttnProcessor,
    XFormersAttnAddedKVProcessor,
)


# --- kernels -----------------------------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""kernel(query (B, heads, Q, d), key (B, heads, K, d), value like key, additive mask, scale) -> like query

The mask broadcasts to (B, heads, Q, K); None: every key is seen. Every kernel sums its scores in float32 or
better, which is what diffusers' `upcast_attention` and `upcast_softmax` ask for.
"""


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, backend: SDPBackend | None = None
) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def _xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(f"it is not installed ({error}); pip install 'unclip[xformers]'") from None
    if mask is not None:  # it does not broadcast
        mask = mask.expand(*query.shape[:3], key.shape[2])
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # (B, length, heads, d)
    return memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale).transpose(1, 2)


def _avx512(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is not None:
        raise ValueError("it takes no mask")
    return avx512.attention(query, key, value, scale)


KERNELS: dict[str, Kernel] = {
    "sdpa": _sdpa,  # torch chooses
    "flash": partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "math": partial(_sdpa, backend=SDPBackend.MATH),
    "xformers": _xformers,
    "avx512": _avx512,
}
AUTO, TORCHS_CHOICE = "auto", "sdpa"
CHOICES = (AUTO, *KERNELS)
ANYWHERE = ("sdpa", "math")  # these take every shape on every device

# What `auto` tries against torch's own choice, by kind of device; elsewhere torch's own choice is taken unmeasured.
# On CPUs that is flash, and `math`, torch's only other, took 1.5 to 10 times as long at every UNet shape measured.
# Not cuDNN's, which plans anew for every number of rows: rows come and go all the time.
CHALLENGERS: dict[str, tuple[str, ...]] = {"cuda": ("flash", "efficient", "xformers"), "cpu": ("avx512",)}
CLEARLY = 0.85  # a challenger's slowest round must take less than this share of the holder's fastest
ROUNDS, CALLS, ROWS = 3, 10, 2  # of a measurement; ROWS as guidance makes of one picture


@dataclass(frozen=True)
class Shape:
    """What a kernel is chosen by. The number of rows is no part of it, so the choice is the same in every batch."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    size: int  # d, of one head
    queries: int  # of one row, however many rows are read at once
    keys: int
    mask: tuple[int, int] | None = None  # (heads, queries) that the mask tells apart, 1: all alike; None: no mask

    def example(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
        """Arguments of a kernel, always the same ones."""
        rng = torch.Generator(self.device).manual_seed(0)

        def per_head(length: int) -> Tensor:
            of_row = (rows, length, self.heads, self.size)
            return torch.randn(of_row, generator=rng, dtype=self.dtype, device=self.device).transpose(1, 2)

        query, key, value = per_head(self.queries), per_head(self.keys), per_head(self.keys)
        mask = None
        if self.mask is not None:
            mask = torch.zeros(rows, *self.mask, self.keys, dtype=self.dtype, device=self.device)
        return query, key, value, mask, self.size**-0.5

    def __str__(self) -> str:
        masked = "" if self.mask is None else ", masked"
        told = f"{self.heads} heads of {self.size}, {self.queries} queries, {self.keys} keys{masked}"
        return f"{told}, {str(self.dtype).removeprefix('torch.')} on {self.device}"


@cache
@torch.no_grad()
def refusal(name: str, shape: Shape) -> str | None:
    """Why kernel `name` does not take this shape, found by running it on one row; None: it does."""
    with warnings.catch_warnings(record=True) as caught:  # torch says as warnings why a kernel was passed over
        warnings.simplefilter("always")
        try:
            KERNELS[name](*shape.example(rows=1))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, ImportError) as error:
            reasons = [str(one.message).partition(" (Triggered")[0] for one in caught] or [str(error)]
            return " ".join(" ".join(reasons).split())
    return None


@cache
def fastest(shape: Shape) -> str:
    """The kernel `auto` takes for this shape, measured once in the life of the process.

    Torch's own choice holds unless a challenger is clearly faster in every round, so that a busy moment does not
    change the choice, and with it the last bits of a picture, from one process to the next.
    """
    challengers = [name for name in CHALLENGERS.get(shape.device.type, ()) if refusal(name, shape) is None]
    if not challengers:
        return TORCHS_CHOICE
    holder, held = TORCHS_CHOICE, seconds(TORCHS_CHOICE, shape)
    for name in challengers:
        took = seconds(name, shape)
        if max(took) < CLEARLY * min(held):
            holder, held = name, took
    logger.info("attention 'auto' takes '%s' for %s", holder, shape)
    return holder


@torch.no_grad()
def seconds(name: str, shape: Shape) -> list[float]:
    """Seconds this kernel takes for two rows of this shape, the mean of each round."""
    arguments = shape.example(ROWS)
    return timed(lambda: KERNELS[name](*arguments), shape.device)


def timed(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of a call on a device, the mean of each round."""

    def calls(count: int) -> None:
        for _ in range(count):
            call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    calls(1)  # the first call loads and plans
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        calls(CALLS)
        rounds.append((time.perf_counter() - began) / CALLS)
    return rounds


@cache
def chosen(name: str, shape: Shape) -> str:
    """The kernel that runs where `name` was asked for; where that one cannot, torch's own choice, logged once."""
    if name == AUTO:
        return fastest(shape)
    if name in ANYWHERE:
        return name
    reason = refusal(name, shape)
    if reason is None:
        return name
    logger.warning("attention '%s' does not run for %s, '%s' does it there: %s", name, shape, TORCHS_CHOICE, reason)
    return TORCHS_CHOICE


@torch.compiler.assume_constant_result  # torch.compile asks it and does not trace what it measures
def kernel_for(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    size: int,
    queries: int,
    keys: int,
    mask: tuple[int, int] | None,
) -> str:
    """`chosen`, of the fields of a shape."""
    with _disable_current_modes():  # torch.export traces what is computed in its modes
        return chosen(name, Shape(device, dtype, heads, size, queries, keys, mask))


# --- which text each evaluation reads ----------------------------------------------------------------------------


T = TypeVar("T")


class Reading(Protocol):
    """What the processors ask of the texts of a network's call of M evaluations."""

    @property
    def block(self) -> int:
        """How many evaluations in a row read one text, at least."""

    def of_layer(self, place: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values (M / block, heads, L, d) of a layer, for the own block or for 1."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Which text each of M evaluations reads, in blocks of equally many evaluations that read the same one.

    The block is the greatest common divisor of how many evaluations in a row read one text: all the candidates
    where every text has equally many, and one evaluation at worst. A block's queries are attended to as those of
    one long picture, which reads the keys and values of its text where they are.
    """

    block: int
    of_block: tuple[int, ...]  # (M / block,) the text each block reads
    pairs: tuple[tuple[Tensor, ...], ...]  # of each text, of each layer that reads it: keys and values (2, heads, L, d)

    @classmethod
    def read(cls, of: Sequence[int], pairs: Sequence[tuple[Tensor, ...]]) -> Texts:
        """Evaluation m reads text of[m], whose keys and values are pairs[of[m]]."""
        block = math.gcd(*(len(list(run)) for _, run in groupby(of)))
        return cls(block, tuple(of[::block]), tuple(pairs))

    def of_layer(self, place: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values (M / block, heads, L, d), for the own block or for 1."""
        each = [self.pairs[text][place] for text in self.of_block for _ in range(self.block // block)]
        key, value = torch.stack(each, 1)
        return key, value

    @property
    def of(self) -> list[int]:
        """(M,) the text each evaluation reads."""
        return [text for text in self.of_block for _ in range(self.block)]

    def of_rows(self, at: slice) -> Tensor:
        """What some evaluations read, of all layers one behind the other (B, sum of 2 * heads * L * d)."""
        read = [self.flat[text] for text in self.of[at]]
        return read[0][None] if len(read) == 1 else torch.stack(read)

    @cached_property
    def flat(self) -> list[Tensor]:
        """Of each text what all layers read, one behind the other."""
        return [torch.cat([pair.flatten() for pair in pairs]) for pairs in self.pairs]


@dataclass(frozen=True, eq=False)
class Handed:
    """Texts of a call as tensors: what reads them is traced and then asked about others."""

    pairs: Sequence[Tensor]  # of each layer that reads a text: keys and values (B, 2, heads, L, d), B dividing M
    block: int = 0  # M / B, which is not known

    @classmethod
    def of(cls, rows: Tensor, shapes: Sequence[Sequence[int]]) -> Handed:
        """As `Texts.of_rows` tells them, the shapes being those of each layer's (2, heads, L, d)."""
        parts = rows.split([math.prod(shape) for shape in shapes], 1)
        return cls([part.unflatten(1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)])

    def of_layer(self, place: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, d); there is one entry for each block already, whichever block is asked for."""
        key, value = self.pairs[place].unbind(1)
        return key, value


@dataclass(eq=False)
class Kept:
    """What the processors of one network keep of texts: told apart by identity, gone with them."""

    pairs: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # Texts.pairs of a text
    calls: WeakKeyDictionary[Distinct[Any], Texts] = field(default_factory=WeakKeyDictionary)

    def read(self, texts: Distinct[T], project: Callable[[list[T]], list[tuple[Tensor, ...]]]) -> Texts:
        """Which text each evaluation reads; `project` is asked for the pairs of those that are new."""
        if texts not in self.calls:
            new = [text for text in texts.unique if text not in self.pairs]
            for text, pairs in zip(new, project(new) if new else [], strict=True):
                self.pairs[text] = pairs
            self.calls[texts] = Texts.read(texts.of, [self.pairs[text] for text in texts.unique])
        return self.calls[texts]


def reading(
    network: nn.Module,
    texts: Distinct[T],  # told apart by identity: token states, or conditions where other things are read as well
    states: Callable[[list[T]], Tensor],  # what the layers read of some of them, (U, L, D)
) -> dict[str, Texts] | None:
    """The network's `cross_attention_kwargs`: which text each evaluation reads, and its keys and values in every layer.

    A text that is new is projected here, not in the network's own call. None where `set_attention` was not called.
    """
    kept = kept_of(network)
    return None if kept is None else {"texts": kept.read(texts, lambda new: projected(network, states(new)))}


def seeing(
    network: nn.Module,
    pictures: Distinct[T],  # told apart by identity
    project: Callable[[list[T]], list[tuple[Tensor, ...]]],  # of some of them the pairs of each layer that reads text
) -> dict[str, Texts]:
    """The same for pictures that the layers see beside their text, by keys and values of their own (IP-Adapter)."""
    kept = kept_of(network)
    assert kept is not None, "asked of a network without these processors"
    return {"pictures": kept.read(pictures, project)}


def kept_of(network: nn.Module) -> Kept | None:
    """What a network's processors keep; None where `set_attention` was not called."""
    first = next(attentions(network), None)
    return first.processor.kept if first is not None and isinstance(first.processor, Processor) else None


@torch.no_grad()  # constants of the text, whatever else is differentiated
def projected(network: nn.Module, states: Tensor) -> list[tuple[Tensor, ...]]:
    """Keys and values (2, heads, L, d) of every text's states (U, L, D), of each layer that reads the text."""
    pairs = [torch.stack(told_pair(layer, states), 1) for layer in text_layers(network)]  # (U, 2, heads, L, d)
    return [tuple(of_layer[text] for of_layer in pairs) for text in range(len(states))]


# --- the processor -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Processor:
    """Stands where diffusers' AttnProcessor2_0 and AttnAddedKVProcessor2_0 stand, one for each layer."""

    name: str  # of the kernel that was asked for
    former: Any  # the processor it stands in for
    place: int | None  # among the layers that read the text; None: this one does not
    kept: Kept  # the network's

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (M, N, C) or (M, C, h, w)
        encoder_hidden_states: Tensor | None = None,  # (M, L, D); None: self-attention
        attention_mask: Tensor | None = None,  # additive: (M, K), or (M or M * heads, 1 or N, K)
        temb: Tensor | None = None,  # what a spatial norm reads
        texts: Reading | None = None,  # None: nothing is known to be shared
        pictures: Reading | None = None,  # seen beside the text; None: none
    ) -> Tensor:
        """Attention with all that `attn` has around it; arguments are named as `Attention.forward` names them."""
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        spatial, added = x.shape, attn.added_kv_proj_dim is not None
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (M, N, C)
        normed = x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        mask = None if attention_mask is None else as_bias(attention_mask, x.shape[0])  # len() is not traced
        own = not attn.only_cross_attention if added else encoder_hidden_states is None  # keys of the picture itself

        pairs = []
        if encoder_hidden_states is None:
            if added:
                pairs.append(pair(attn, attn.add_k_proj(x), attn.add_v_proj(x)))
        elif texts is None or self.place is None:
            pairs.append(told_pair(attn, encoder_hidden_states))
        else:
            block = 1 if own or mask is not None else texts.block
            pairs.append(texts.of_layer(self.place, block))
        if own:
            pairs.append(pair(attn, attn.to_k(normed), attn.to_v(normed)))
        key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in zip(*pairs, strict=True))

        query = attn.to_q(normed)
        x = self._attend(attn, query, key, value, mask)
        if pictures is not None and self.place is not None:
            x = x + self._attend(attn, query, *pictures.of_layer(self.place, pictures.block), None)
        x = attn.to_out[1](attn.to_out[0](x))  # (M, N, C)
        x = x.transpose(1, 2).reshape(spatial) if len(spatial) == 4 else x
        x = x + hidden_states if attn.residual_connection or added else x
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (M, N, heads * d), equally many rows of them to each of keys and values (B, heads, K, d)."""
        rows, queries, width = query.shape
        folded = per_head(query.reshape(key.shape[0], -1, width), attn.heads)
        folded = folded if attn.norm_q is None else attn.norm_q(folded)
        if mask is not None:  # keys behind the last one it tells of are seen, as in diffusers
            mask = F.pad(mask, (0, max(0, key.shape[2] - mask.shape[3])))
        apart = None if mask is None else (mask.shape[1], mask.shape[2])
        name = self.name
        if name not in ANYWHERE:
            name = kernel_for(name, key.device, key.dtype, attn.heads, key.shape[3], queries, key.shape[2], apart)
        attended = KERNELS[name](folded, key, value, mask, attn.scale)
        return attended.transpose(1, 2).reshape(rows, queries, width)


def per_head(states: Tensor, heads: int) -> Tensor:
    """(B, length, heads * d) as (B, heads, length, d)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def pair(attn: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Projections (B, K, heads * d) as the layer's keys and values (B, heads, K, d)."""
    key = per_head(key, attn.heads)
    return key if attn.norm_k is None else attn.norm_k(key), per_head(value, attn.heads)


def told_pair(attn: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, L, d) of encoder_hidden_states (B, L, D)."""
    states = states if attn.norm_cross is None else attn.norm_encoder_hidden_states(states)
    if attn.added_kv_proj_dim is None:
        return pair(attn, attn.to_k(states), attn.to_v(states))
    return pair(attn, attn.add_k_proj(states), attn.add_v_proj(states))


def as_bias(mask: Tensor, rows: int) -> Tensor:
    """An additive mask as diffusers hands it over, as (rows, 1 or heads, 1 or N, K)."""
    return mask.reshape(rows, -1, 1 if mask.ndim == 2 else mask.shape[1], mask.shape[-1])


# --- the switch --------------------------------------------------------------------------------------------------


def attentions(network: nn.Module) -> Iterator[Attention]:
    """Every diffusers Attention in a network."""
    return (module for module in network.modules() if isinstance(module, Attention))


def adds_keys(network: nn.Module) -> bool:
    """Whether layers see the picture's keys beside the text's (Karlo, Kandinsky), so that rows cannot share these."""
    return any(layer.added_kv_proj_dim is not None for layer in attentions(network))


def text_layers(network: nn.Module) -> Iterator[Attention]:
    """Those of them that read the text, of a network with these processors."""
    return (layer for layer in attentions(network) if layer.processor.place is not None)


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError for an unknown name, and for a kernel that this device or installation never runs in this dtype."""
    if name not in CHOICES:
        raise ValueError(f"attention '{name}' is unknown; choose from: {', '.join(CHOICES)}")
    easy = Shape(device, dtype, heads=2, size=64, queries=64, keys=64)  # any kernel that runs there takes it
    reason = None if name == AUTO else refusal(name, easy)
    if reason is not None:
        runs = ", ".join((AUTO, *(other for other in KERNELS if refusal(other, easy) is None)))
        where = f"{str(dtype).removeprefix('torch.')} on {device}"
        raise ValueError(f"attention '{name}' does not run in {where} ({reason}); choose from: {runs}")


def set_attention(network: nn.Module, name: str = AUTO) -> None:
    """Let every Attention of a diffusers network compute with the kernel of this name (one of `CHOICES`).

    Raises ValueError for what `check_attention` refuses and for a network whose processors are not diffusers' plain
    ones. A kernel that runs there but not for some shape (flash and a mask on CUDA) leaves that shape to torch's own
    choice and logs why.
    """
    layers = list(attentions(network))
    check_attention(name, place_of(network), layers[0].to_q.weight.dtype if layers else torch.float32)
    for layer in layers:
        if not isinstance(layer.processor, (*STOCK, Processor)):
            kind = type(layer.processor).__name__
            raise ValueError(f"attention '{name}' would replace a {kind}, which does more; take that one out first")
    restore_attention(network)
    places, kept = count(), Kept()
    for layer in layers:
        place = next(places) if layer.is_cross_attention else None
        layer.set_processor(Processor(name, layer.processor, place, kept))


def restore_attention(network: nn.Module) -> None:
    """Put every Attention's former processor back; one that is not ours stays."""
    for layer in attentions(network):
        if isinstance(layer.processor, Processor):
            layer.set_processor(layer.processor.former)
