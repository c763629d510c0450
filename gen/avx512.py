"""Attention in bfloat16 on processors with AVX512-BF16, by a kernel of our own (`cpp/attention.hpp`).

Products are AMX's where the processor has them. It is for small heads, where the exponentials of the softmax take long.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen.compiled import built

LARGEST = 160  # values of a head
NEEDED = {"avx512_bf16", "avx512_vnni", "avx512bw", "avx512dq", "avx512f", "avx512vl"}  # as Linux names them
TILES = {"amx_bf16", "amx_tile"}
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni")
TILE_FLAGS = ("-mamx-tile", "-mamx-bf16")


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale query key^T) value, of bfloat16 (B, heads, Q, d), (B, heads, K, d) and the same.

    Flash attention (Dao et al. 2022). Gradients are torch's. ValueError for what it does not compute, which is all but
    bfloat16 on the CPU with d of at most `LARGEST`; RuntimeError where it cannot run or be built. Both say why.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        raise ValueError("it computes in bfloat16 on the CPU")
    if query.shape[3] > LARGEST:
        raise ValueError(f"it takes heads of at most {LARGEST} values, not {query.shape[3]}")
    library()
    answer: Tensor = _attention(query, key, value, scale)
    return answer


def library() -> ctypes.CDLL:
    """The kernel, ready to run. RuntimeError that says why it cannot run here."""
    return ready()[0]


def flags() -> tuple[str, ...]:
    """What the compiler is told of this processor; the same RuntimeError."""
    return ready()[1]


@cache
def ready() -> tuple[ctypes.CDLL, tuple[str, ...]]:
    """The kernel and the flags that it was built by: AMX's where the processor and the operating system give it."""
    able = abilities()
    if not able >= NEEDED:
        raise RuntimeError("it needs Linux and a processor with AVX512-BF16")
    if able >= TILES:
        found = ctypes.CDLL(str(built("attention.cpp", (*FLAGS, *TILE_FLAGS))))
        if found.allowed():
            return found, (*FLAGS, *TILE_FLAGS)
    return ctypes.CDLL(str(built("attention.cpp", FLAGS))), FLAGS


def abilities() -> set[str]:
    """The processor's flags in /proc/cpuinfo; none off Linux, whose system call the kernel needs for AMX's tiles."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().partition("flags")[2].partition("\n")[0].split()) if cpuinfo.exists() else set()


@torch.library.custom_op("unclip::avx512_attention", mutates_args=())  # torch.compile does not look into it
def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    answer = _like(query)
    arrays = (query, key, value, answer)
    steps = (ctypes.c_int64 * 12)(*(step for each in arrays for step in each.stride()[:3]))
    rows, heads, queries, size = query.shape
    arguments = (steps, rows, heads, queries, key.shape[2], size, ctypes.c_float(scale), torch.get_num_threads())
    library().attend(*(ctypes.c_void_p(each.data_ptr()) for each in arrays), *arguments)
    return answer


@_attention.register_fake
def _like(query: Tensor, *_: object) -> Tensor:
    rows, heads, queries, size = query.shape
    return query.new_empty(rows, queries, heads, size).transpose(1, 2)  # as who reads it has it


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale = inputs[3]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        asking = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)  # the scale asks none
        again = [each.detach().requires_grad_(asked) for each, asked in asking]
        query, key, value = again
        answer = F.scaled_dot_product_attention(query, key, value, scale=ctx.scale)
    found = iter(torch.autograd.grad(answer, [each for each in again if each.requires_grad], gradient))
    return (*(next(found) if each.requires_grad else None for each in again), None)


_attention.register_autograd(_backward, setup_context=_setup)
