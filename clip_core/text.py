"""CLIP's text tower: half of a whole CLIP, and what stands alone as `text_encoder` in a diffusers folder.

Owns how texts become ids and ids become states, as diffusers reads them: padded to one length, the padding's
states included. It knows no pictures and no files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from clip_core.device import network_device, to_device
from clip_core.wording import quoted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Texts as ids, padded to one length L, on the CPU."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) bool, true up to and with the end of the text


@dataclass(frozen=True)
class TextPiece:
    """A window of a long text: what a tower reads at once, up to L - 2 tokens between begin and end of text."""

    parts: tuple[tuple[str, float], ...]  # of the whole text, and what each counts; tokens never span two
    number: int = 0  # which of its pieces; one behind the last is empty

    def __bool__(self) -> bool:
        """Whether there is any text, in this piece or another."""
        return any(text for text, _ in self.parts)

    def tokens(self, tokenizer: Any, length: int) -> list[tuple[int, float]]:
        """Ids and what each counts, L with both ends and padding, which count 1."""
        room = length - 2
        inner = counted(tokenizer, self.parts)[self.number * room : (self.number + 1) * room]
        ends = [(tokenizer.bos_token_id, 1.0), *inner, (tokenizer.eos_token_id, 1.0)]
        return ends + [(tokenizer.pad_token_id, 1.0)] * (length - len(ends))

    def weights(self, tokenizer: Any, length: int) -> Tensor:
        """What each token counts, (L,) float32."""
        return torch.tensor([weight for _, weight in self.tokens(tokenizer, length)])


@dataclass(frozen=True, eq=False)
class TextStates:
    """What a text tower says of B texts, before any projection."""

    tokens: Tensor  # (B, L, D) states, after the final layer norm unless it was left out
    pooled: Tensor  # (B, D) the state at the end of the text
    mask: Tensor  # (B, L) bool, true up to and with the end of the text


@dataclass(frozen=True, eq=False)
class TextTower:
    """A CLIPTextModel with its tokenizer."""

    tokenizer: Any  # a CLIPTokenizer
    encoder: Any  # a CLIPTextModel

    @property
    def shape(self) -> tuple[int, int]:
        """Length L in tokens and width D."""
        return self.tokenizer.model_max_length, self.encoder.config.hidden_size

    def num_pieces(self, parts: Sequence[tuple[str, float]]) -> int:
        """How many pieces a text of these parts has, one at least."""
        room = self.shape[0] - 2
        return max(1, -(-len(counted(self.tokenizer, parts)) // room))

    def __call__(
        self, texts: Sequence[str | TextPiece], clip_skip: int | None = None, *, normed: bool = True
    ) -> TextStates:
        """Encode texts; longer ones are cut with a warning."""
        length, _ = self.shape
        whole = [text for text in texts if isinstance(text, str)]
        if whole:
            assert len(whole) == len(texts), "texts or pieces of them"
            tokens, lengths = tokenize(self.tokenizer, whole, length)
            warn_cut(whole, lengths, length)
        else:
            tokens = tokens_of(self.tokenizer, [text for text in texts if isinstance(text, TextPiece)], length)
        return self.read(tokens, clip_skip, normed=normed)

    def read(self, tokens: Tokens, clip_skip: int | None = None, *, normed: bool = True) -> TextStates:
        """States of the last layer, or of the one `clip_skip` layers before it (diffusers' meaning), normed.

        `normed` False leaves the final layer norm out; it takes a `clip_skip`. The pooled state is always normed.

        No mask goes in, as in diffusers, unless the configuration says `use_attention_mask`: pads come after
        the end, so they change no state but their own, and UNets were trained on those too.
        """
        assert normed or clip_skip is not None, "the last layer's states come normed"
        device = network_device(self.encoder)
        mask = to_device(tokens.attention_mask, device)
        out = self.encoder(
            input_ids=to_device(tokens.input_ids, device),
            attention_mask=mask if getattr(self.encoder.config, "use_attention_mask", False) else None,
            output_hidden_states=clip_skip is not None,
        )
        states = out.last_hidden_state  # (B, L, D)
        if clip_skip is not None:
            states = skip(out.hidden_states, clip_skip)
            states = self.encoder.final_layer_norm(states) if normed else states
        return TextStates(states, out.pooler_output, mask)


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tokens, list[int]]:
    """Ids as a tokenizer of transformers pads and cuts by itself, and how many tokens each text has before."""
    texts = [spelled_out(tokenizer, text) for text in texts]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    batch = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
        return_attention_mask=True,  # SigLIP's hands none over unasked
    )
    return Tokens(batch.input_ids, batch.attention_mask.bool()), lengths


def counted(tokenizer: Any, parts: Sequence[tuple[str, float]]) -> list[tuple[int, float]]:
    """The ids of a text's parts, without its ends, and what each counts."""
    return [
        (token, weight)
        for text, weight in parts
        for token in tokenizer(spelled_out(tokenizer, text), add_special_tokens=False, verbose=False).input_ids
    ]


def tokens_of(tokenizer: Any, pieces: Sequence[TextPiece], length: int) -> Tokens:
    """Ids of pieces of texts."""
    ids = torch.tensor([[token for token, _ in piece.tokens(tokenizer, length)] for piece in pieces])
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    return Tokens(ids, torch.arange(length)[None] <= ends[:, None])


def spelled_out(tokenizer: Any, text: str) -> str:
    """A text with every learned word of several vectors as its tokens: word, word_1, ..., as diffusers names them."""
    added = tokenizer.added_tokens_encoder
    spelled = {word: [word, *takewhile(added.__contains__, (f"{word}_{k}" for k in count(1)))] for word in added}
    if all(len(tokens) == 1 for tokens in spelled.values()):
        return text
    folded = {word.lower(): " ".join(tokens) for word, tokens in spelled.items()}  # tokenizers lower the case
    longest_first = "|".join(re.escape(word) for word in sorted(added, key=len, reverse=True))
    return re.sub(longest_first, lambda found: folded[found[0].lower()], text, flags=re.IGNORECASE)


def warn_cut(texts: Sequence[str], lengths: Sequence[int], length: int) -> None:
    """Say in the log which texts are longer than a tower reads."""
    for text, given in zip(texts, lengths, strict=True):
        if given > length:
            logger.warning("a text of %d tokens is cut to %d: %s", given, length, quoted(text))


def skip(states: Sequence[Tensor], clip_skip: int) -> Tensor:
    """As diffusers' encode_prompt: 0 the last layer's states, 1 those before it, and so on."""
    if not 0 <= clip_skip < len(states):
        raise ValueError(f"clip_skip is {clip_skip}; give 0 to {len(states) - 1} for this text tower, or None")
    return states[-(clip_skip + 1)]


def without_projection(model: CLIPModel) -> CLIPTextModel:
    """The text half of a whole CLIP, sharing its weights."""
    if isinstance(model.text_model, CLIPTextModel):
        return model.text_model
    with torch.device("meta"):
        tower = CLIPTextModel(model.config.text_config)
    tower.text_model = model.text_model
    return tower.eval()


def with_projection(model: CLIPModel) -> CLIPTextModelWithProjection:
    """The text half of a whole CLIP with its projection, sharing the weights."""
    with torch.device("meta"):
        tower = CLIPTextModelWithProjection(model.config.text_config)
    tower.text_model, tower.text_projection = model.text_model, model.text_projection
    return tower.eval()
