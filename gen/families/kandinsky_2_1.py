"""Kandinsky 2.1: the UNet reads the prompt through a multilingual text tower, and the image embedding beside it.

The tower is XLM-RoBERTa with a projection that was trained to say what CLIP says (M-CLIP, Carlsson et al. 2022). Its
states follow ten tokens of the image embedding; its projected mean goes in with the timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from torch import Tensor
from transformers import XLMRobertaTokenizer

from clip_core.clip import TextFeatures
from clip_core.device import network_device, to_device
from clip_core.text import tokenize, warn_cut
from gen.checkpoint import Parts
from gen.conditioning import Condition, Conditions, each_read
from gen.families.base import listed, own
from gen.families.kandinsky import Kandinsky

LENGTH = 77  # tokens, to which stock's pipeline pads and cuts every text


@dataclass(frozen=True, eq=False)
class MultilingualTower:
    """A MultilingualCLIP with its tokenizer."""

    tokenizer: XLMRobertaTokenizer
    encoder: MultilingualCLIP

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """States (B, L, D) of the last layer and the projected mean (B, E) of those that are text."""
        tokens, lengths = tokenize(self.tokenizer, texts, LENGTH)
        warn_cut(texts, lengths, LENGTH)
        device = network_device(self.encoder)
        mask = to_device(tokens.attention_mask, device)
        embedding, states = self.encoder(input_ids=to_device(tokens.input_ids, device), attention_mask=mask.long())
        return TextFeatures(states, embedding, mask)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Kandinsky21(Kandinsky):
    """A loaded Kandinsky 2.1."""

    text: MultilingualTower

    SAVED_AS: ClassVar[str] = "KandinskyPipeline"
    INPAINTS_AS: ClassVar[str | None] = "KandinskyInpaintPipeline"
    HOLDS: ClassVar[bool] = False
    ASKS: ClassVar[dict[str, str]] = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        got = listed(parts, ["tokenizer", "text_encoder"])
        return cls.with_prior(parts, text=MultilingualTower(got["tokenizer"], got["text_encoder"]))

    @property
    def embedding_width(self) -> int:
        """E of the image embedding, and of the text's."""
        return self.unet.config.cross_attention_dim

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | {"tokenizer": self.text.tokenizer, "text_encoder": self.text.encoder}

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        config, required = self.text.encoder.config, super().required_config()
        required["unet encoder_hid_dim"] = (self.unet.config.encoder_hid_dim, config.transformerDimensions)
        required["text_encoder numDims"] = (config.numDims, self.embedding_width)
        return required

    def words(self, texts: Sequence[str]) -> list[Condition]:
        """Token states (L, D) and the text's embedding (E,); the empty text is read once."""
        return each_read(texts, lambda: self._nothing, self._read)

    def pictured(self, words: Condition, image_embeds: Tensor) -> Condition:
        """The same with an image embedding behind the text's, (2E,)."""
        assert words.pooled_projections is not None, "words have an embedding"
        return replace(words, pooled_projections=torch.cat([words.pooled_projections, own(image_embeds, self.unet)]))

    def added_cond_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """The UNet's `added_cond_kwargs`."""
        assert conditions.pooled_projections is not None, "every condition has its image embedding by now"
        text, image = conditions.pooled_projections.chunk(2, dim=1)
        return {"text_embeds": text, "image_embeds": image}

    def _read(self, texts: Sequence[str]) -> list[Condition]:
        features = self.text(texts)
        pairs = zip(features.tokens, features.embedding, strict=True)
        return [Condition(own(tokens, self.unet), own(embedding, self.unet)) for tokens, embedding in pairs]

    @cached_property
    @torch.no_grad()
    def _nothing(self) -> Condition:
        """The empty text, which most pictures are guided away from; read once."""
        return self._read([""])[0]
