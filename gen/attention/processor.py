"""What stands in one layer: it computes what diffusers' AttnProcessor2_0 and AttnAddedKVProcessor2_0 compute.

Where it is told which text each evaluation reads, it reads keys and values that are there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from torch import Tensor

from gen.attention.kernels import ANYWHERE, KERNELS, kernel_for
from gen.attention.texts import Reading, TextCache
from gen.conditioning import Alike

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


@dataclass(eq=False)
class Processor:
    """Stands where diffusers' AttnProcessor2_0 and AttnAddedKVProcessor2_0 stand, one for each layer."""

    name: str  # of the kernel that was asked for
    former: Any  # the processor it stands in for
    place: int | None  # among the layers that read the text; None: this one does not
    text_cache: TextCache  # the network's
    is_first: bool = False  # whether no layer before this one reads the text

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (M, N, C) or (M, C, h, w)
        encoder_hidden_states: Tensor | None = None,  # (M, L, D); None: self-attention
        attention_mask: Tensor | None = None,  # additive: (M, K), or (M or M * heads, 1 or N, K)
        temb: Tensor | None = None,  # what a spatial norm reads
        texts: Reading | None = None,  # None: nothing is known to be shared
        pictures: Reading | None = None,  # seen beside the text; None: none
        alike: Alike | None = None,  # which evaluations are one until they read their texts; None: none is known to be
    ) -> Tensor:
        """Attention with all that `attn` has around it; arguments are named as `Attention.forward` names them."""
        if alike is not None and self.is_first:
            assert attention_mask is None, "the first layer sees all of a picture"
            return alike.each(self(attn, alike.once(hidden_states), temb=temb))
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
            pairs.append(text_pair(attn, encoder_hidden_states))
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


def text_pair(attn: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, L, d) of encoder_hidden_states (B, L, D)."""
    states = states if attn.norm_cross is None else attn.norm_encoder_hidden_states(states)
    if attn.added_kv_proj_dim is None:
        return pair(attn, attn.to_k(states), attn.to_v(states))
    return pair(attn, attn.add_k_proj(states), attn.add_v_proj(states))


def as_bias(mask: Tensor, rows: int) -> Tensor:
    """An additive mask as diffusers hands it over, as (rows, 1 or heads, 1 or N, K)."""
    return mask.reshape(rows, -1, 1 if mask.ndim == 2 else mask.shape[1], mask.shape[-1])
