"""What differs between transformers' CLIP and SigLIP and open_clip's CLIP, made alike: tokens, states, embeddings.

Each class wraps one library's model and tokenizer and calls them as that library does. They know no files
and no preprocessing; `clip_core.clip.CLIP` is the face that others use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import open_clip
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from transformers import CLIPModel, SiglipModel

from clip_core.text import TextTower, Tokens, skip, tokenize

LEGACY_EOS_ID = 2  # in a config from before transformers 4.31: pool the highest id, whichever it is


@dataclass(frozen=True)
class TextFeatures:
    """What CLIP's text tower says of B texts."""

    tokens: Tensor  # (B, L, D) states after the final layer norm
    embedding: Tensor  # (B, E) the pooled state projected, not normalised
    mask: Tensor  # (B, L) bool, true up to and with the end of the text


class Towers(Protocol):
    """One library's CLIP: model and tokenizer."""

    model: Any
    tokenizer: Any
    max_length: int  # L

    def tokenize(self, texts: Sequence[str]) -> tuple[Tokens, list[int]]:
        """Ids, and how many tokens each text has before it is cut."""

    def text(self, tokens: Tokens, clip_skip: int | None) -> TextFeatures:
        """States `clip_skip` layers before the last, normed; the embedding is always of the last."""

    def image(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed (B, 3, H, W) -> (B, E), not normalised."""

    @property
    def image_network(self) -> nn.Module:
        """The module that does nearly all of `image`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the image tower takes."""


class TransformersTowers:
    """transformers.CLIPModel with its CLIPTokenizer."""

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        config, eos = model.config.text_config, tokenizer.eos_token_id
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} ids, the text tower only {config.vocab_size}")
        if tokenizer.padding_side != "right":
            raise ValueError("the tokenizer pads on the left; CLIP counts positions from the start: pad right")
        highest = eos == tokenizer.vocab_size - 1
        if eos == LEGACY_EOS_ID or not (
            config.eos_token_id == eos or (config.eos_token_id == LEGACY_EOS_ID and highest)
        ):
            raise ValueError(
                f"text_config.eos_token_id is {config.eos_token_id}, the tokenizer's is {eos}: text would be "
                f"pooled at a wrong place; make them equal, and not {LEGACY_EOS_ID}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        size = model.config.vision_config.image_size
        self.image_size = (size, size)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tokens, list[int]]:
        """As the tokenizer pads and cuts by itself."""
        return tokenize(self.tokenizer, texts, self.max_length)

    def text(self, tokens: Tokens, clip_skip: int | None) -> TextFeatures:
        """States and projection as CLIPTextModelWithProjection gives them."""
        states = TextTower(self.tokenizer, self.model.text_model).read(tokens, clip_skip)
        return TextFeatures(states.tokens, self.model.text_projection(states.pooled), states.mask)

    def image(self, pixel_values: Tensor) -> Tensor:
        """As CLIPVisionModelWithProjection."""
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        embedding: Tensor = self.model.visual_projection(pooled)
        return embedding

    @property
    def image_network(self) -> nn.Module:
        """The tower."""
        tower: nn.Module = self.model.vision_model
        return tower


class SiglipTowers:
    """transformers.SiglipModel with its own tokenizer (SigLIP, Zhai et al. 2023; SigLIP 2, Tschannen et al. 2025)."""

    def __init__(self, model: SiglipModel, tokenizer: Any) -> None:
        config = model.config.text_config
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} ids, the text tower only {config.vocab_size}")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; SigLIP reads every text padded to its whole length")
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        size = model.config.vision_config.image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])

    def tokenize(self, texts: Sequence[str]) -> tuple[Tokens, list[int]]:
        """As the tokenizer pads and cuts by itself, always to the whole length: that is how SigLIP was trained."""
        return tokenize(self.tokenizer, texts, self.max_length)

    def text(self, tokens: Tokens, clip_skip: int | None) -> TextFeatures:
        """As `get_text_features` of what the tokenizer hands over, which most often is no mask."""
        if clip_skip is not None:
            raise ValueError("clip_skip needs a CLIP text tower; this model's is SigLIP's: give None")
        masked = "attention_mask" in self.tokenizer.model_input_names
        mask = tokens.attention_mask.long() if masked else None
        out = self.model.text_model(input_ids=tokens.input_ids, attention_mask=mask)
        return TextFeatures(out.last_hidden_state, out.pooler_output, tokens.attention_mask)

    def image(self, pixel_values: Tensor) -> Tensor:
        """As `get_image_features`."""
        embedding: Tensor = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return embedding

    @property
    def image_network(self) -> nn.Module:
        """The tower."""
        tower: nn.Module = self.model.vision_model
        return tower


class OpenClipTowers:
    """CLIP or CustomTextCLIP of open_clip (own text tower or Hugging Face's), its declared tokenizer."""

    def __init__(self, model: open_clip.CLIP | open_clip.CustomTextCLIP, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length = getattr(tokenizer, "context_length", None) or model.context_length
        size = model.visual.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tokens, list[int]]:
        """As the tokenizer pads and cuts by itself; open_clip gives no mask, so it is worked out here."""
        input_ids = self.tokenizer(list(texts), context_length=self.max_length)
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            # its padding is id 0, which is also the token "!": only the end token tells where the text stops
            lengths = [len(self.tokenizer.encode(text)) + 2 for text in texts]
            mask = _up_to_first(input_ids, self.tokenizer.eot_token_id)
        else:
            inner = self.tokenizer.tokenizer
            lengths = [len(inner(self.tokenizer.clean_fn(text), verbose=False).input_ids) for text in texts]
            if inner.pad_token_id == inner.eos_token_id:
                mask = _up_to_first(input_ids, inner.eos_token_id)
            else:
                mask = input_ids != inner.pad_token_id
        return Tokens(input_ids, mask), lengths

    def text(self, tokens: Tokens, clip_skip: int | None) -> TextFeatures:
        """States before pooling, and what `encode_text` gives."""
        tower = self.model if isinstance(self.model, open_clip.CLIP) else self.model.text
        if isinstance(tower, HFTextEncoder):
            return self._hugging_face_text(tower, tokens, clip_skip)
        if isinstance(tower, open_clip.CLIP):
            out = tower.forward_intermediates(text=tokens.input_ids, normalize=False)
        else:
            out = tower.forward_intermediates(tokens.input_ids, output_fmt="NLC")
        states = tower.ln_final(skip(out["text_intermediates"], clip_skip or 0))  # (B, L, D)
        return TextFeatures(states, out["text_features"], tokens.attention_mask)

    def _hugging_face_text(self, tower: Any, tokens: Tokens, clip_skip: int | None) -> TextFeatures:
        if clip_skip is not None:
            raise ValueError("clip_skip needs a CLIP text tower; this model's is a Hugging Face one: give None")
        mask = (tokens.input_ids != tower.config.pad_token_id).long()  # as HFTextEncoder.forward masks
        out = tower.transformer(input_ids=tokens.input_ids, attention_mask=mask)
        embedding = tower.proj(tower.pooler(out, mask))
        return TextFeatures(out.last_hidden_state, embedding, tokens.attention_mask)

    def image(self, pixel_values: Tensor) -> Tensor:
        """As `encode_image`."""
        embedding: Tensor = self.model.encode_image(pixel_values)
        return embedding

    @property
    def image_network(self) -> nn.Module:
        """The tower."""
        tower: nn.Module = self.model.visual
        return tower


def make_towers(model: nn.Module, tokenizer: Any) -> Towers:
    """The wrapper for a model's library; ValueError for a model of another kind."""
    if isinstance(model, CLIPModel):
        return TransformersTowers(model, tokenizer)
    if isinstance(model, SiglipModel):
        return SiglipTowers(model, tokenizer)
    if isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP):
        return OpenClipTowers(model, tokenizer)
    known = "transformers CLIPModel, transformers SiglipModel, open_clip CLIP, open_clip CustomTextCLIP"
    raise ValueError(f"a {type(model).__name__} is not a CLIP that can be used here; give one of: {known}")


def _up_to_first(input_ids: Tensor, token: int) -> Tensor:
    """True up to and with the first `token` of each row, (B, L)."""
    here = (input_ids == token).int()
    return (here.cumsum(dim=1) - here) == 0
