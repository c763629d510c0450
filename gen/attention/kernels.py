"""Attention itself: the kernels by their names, and which of them computes a shape.

A kernel takes queries, keys and values of heads and knows no layer. `auto` is measured on CUDA, once for each shape.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from gen import avx512

logger = logging.getLogger(__name__)

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

# What `auto` takes unmeasured, by kind of device, where it runs and a row has so many scores: on CPUs the least at
# which ours took half of torch's time on one thread and on two; below, threads take longer to start than they gain.
# Torch's own choice there is flash; `math`, its only other, took 1.5 to 10 times as long at every UNet shape measured.
PREFERRED: dict[str, tuple[str, int]] = {"cpu": ("avx512", 100_000)}
# What it tries against torch's own choice; elsewhere that is taken unmeasured. Not cuDNN's, which plans anew for every
# number of rows: rows come and go all the time.
CHALLENGERS: dict[str, tuple[str, ...]] = {"cuda": ("flash", "efficient", "xformers")}
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
        sizes = f"{self.heads} heads of {self.size}, {self.queries} queries, {self.keys} keys{masked}"
        return f"{sizes}, {str(self.dtype).removeprefix('torch.')} on {self.device}"


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


def preferred(shape: Shape) -> str | None:
    """The kernel `auto` takes for this shape unmeasured; None: it measures."""
    name, least = PREFERRED.get(shape.device.type, (None, 0))
    if name is None or shape.heads * shape.queries * shape.keys < least or refusal(name, shape) is not None:
        return None
    logger.info("attention 'auto' takes '%s' for %s", name, shape)
    return name


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
        return preferred(shape) or fastest(shape)
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
