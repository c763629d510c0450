"""What the networks are told, apart from x and its noise level.

A `Condition` belongs to no row: it lives once in a `Table`, and rows carry its index, so the sixteen
candidates of a prompt share one null and one encoding of their text. `TextTower` turns texts into what
conditions are made of. Nothing here knows rows, samplers or guidance; which numbers mean "null" is a family's
to say.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Condition:
    """One thing a network can be told; what is None, this network does not take."""

    tokens: Tensor | None = None  # (L, D), cross-attended
    vector: Tensor | None = None  # (V,), the UNet's class input or the prior's text embedding
    mask: Tensor | None = None  # (L,) bool, True where there is text


@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditions gathered for one network call, one per evaluation."""

    tokens: Tensor | None  # (M, L, D)
    vector: Tensor | None  # (M, V)
    mask: Tensor | None  # (M, L)


@dataclass(eq=False)
class Table:
    """The conditions of all rows in flight."""

    conditions: list[Condition] = field(default_factory=list)
    _last: tuple[tuple[int, ...], Conditions] | None = None

    def add(self, condition: Condition) -> int:
        """Keep a condition and return the index that rows carry."""
        self.conditions.append(condition)
        return len(self.conditions) - 1

    def gather(self, indices: Sequence[int]) -> Conditions:
        """The conditions at `indices`, stacked; the last answer is kept, since most ticks ask the same."""
        key = tuple(indices)
        if self._last is None or self._last[0] != key:
            chosen = [self.conditions[index] for index in key]
            gathered = Conditions(
                stacked([condition.tokens for condition in chosen]),
                stacked([condition.vector for condition in chosen]),
                stacked([condition.mask for condition in chosen]),
            )
            self._last = (key, gathered)
        return self._last[1]


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All tensors along a new first axis; None when there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors)), "a network takes a kind of condition always or never"
    return torch.stack(given) if given else None


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What a text tower says of B texts."""

    tokens: Tensor  # (B, L, D), after the final layer norm
    pooled: Tensor  # (B, D), the token that ends the text
    mask: Tensor  # (B, L) bool, True where there is text


@dataclass(frozen=True, eq=False)
class TextTower:
    """A CLIP text encoder with its tokenizer, read as diffusers reads it: padded to the full length."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel

    @property
    def shape(self) -> tuple[int, int]:
        """Length L in tokens and width D."""
        return self.tokenizer.model_max_length, self.encoder.config.hidden_size

    def __call__(self, texts: Sequence[str], clip_skip: int | None = None) -> TextFeatures:
        """Encode texts; longer ones are cut with a warning. `clip_skip` layers are left out of the tokens.

        As in diffusers the encoder gets no mask unless its configuration says `use_attention_mask`: the UNet
        was trained on the padding's states too.
        """
        length = self.tokenizer.model_max_length
        encoded = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        self._warn_cut(texts)
        device = self.encoder.device
        mask = encoded.attention_mask.to(device)
        output = self.encoder(
            input_ids=encoded.input_ids.to(device),
            attention_mask=mask if getattr(self.encoder.config, "use_attention_mask", False) else None,
            output_hidden_states=clip_skip is not None,
        )
        tokens = output.last_hidden_state  # (B, L, D)
        if clip_skip is not None:
            tokens = self.encoder.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return TextFeatures(tokens, output.pooler_output, mask.bool())

    def _warn_cut(self, texts: Sequence[str]) -> None:
        length = self.tokenizer.model_max_length
        for text in texts:
            ids = self.tokenizer(text).input_ids
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                logger.warning("text is longer than %d tokens; the model does not see: %s", length, lost)
