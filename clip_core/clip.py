"""CLIP as everyone else here sees it: token states, text embedding, image embedding, score.

One face over transformers CLIP and SigLIP folders and open_clip models. It knows no diffusion and draws no picture; who
trains a CLIP calls the same methods, since none of them forbids gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clip_core.device import to_device
from clip_core.load import load
from clip_core.preprocess import Preprocess
from clip_core.score import cosine
from clip_core.text import Tokens, warn_cut
from clip_core.towers import TextFeatures, make_towers

__all__ = ["CLIP", "TextFeatures", "Tokens"]


class CLIP:
    """A CLIP model with its tokenizer and preprocessing (Radford et al. 2021)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        preprocess: Preprocess | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        """Wrap a transformers CLIPModel or SiglipModel, or an open_clip model, with its tokenizer.

        `preprocess` None: the shorter side to the tower's size, bicubic, middle crop, OpenAI's mean and std. `files`
        are all that it was read from, by name; None: it was made in memory.
        """
        self.files = dict(files or {})
        self.towers = make_towers(model, tokenizer)
        self.preprocess = preprocess or Preprocess().with_size(max(self.towers.image_size))
        if self.preprocess.output_size not in (None, self.towers.image_size):
            given, wanted = self.preprocess.output_size, self.towers.image_size
            raise ValueError(f"pictures are prepared at {given}, the image tower takes {wanted}; make them equal")

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
    ) -> CLIP:
        """A transformers CLIP or SigLIP folder, a folder open_clip wrote, a hub id, or "open_clip:NAME/TAG".

        Only safetensors are read, and only a hub id or an open_clip name touches the network. The weights
        come frozen, in eval mode, as `dtype`, on `device` (None: the CPU). `attn_implementation` is a name
        of transformers' and does not touch open_clip models. Raises a one-line ValueError that names a
        missing or damaged file.
        """
        model, tokenizer, preprocess, files = load(name_or_folder, dtype, attn_implementation)
        return cls(model.eval().requires_grad_(False), tokenizer, preprocess, files).to(device)

    @property
    def model(self) -> Any:
        """The library's own model: transformers' CLIPModel or SiglipModel, or open_clip's."""
        return self.towers.model

    @property
    def tokenizer(self) -> Any:
        """The library's own tokenizer."""
        return self.towers.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.logit_scale.dtype

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of 1 / temperature, as learned."""
        scale: Tensor = self.towers.model.logit_scale
        return scale.squeeze()  # some open_clip models hold it as (1,)

    @property
    def logit_bias(self) -> Tensor | None:
        """What SigLIP adds to a scaled cosine, as learned; None: a CLIP that learned by contrast has none."""
        bias: Tensor | None = getattr(self.towers.model, "logit_bias", None)
        return None if bias is None else bias.squeeze()

    @property
    def max_length(self) -> int:
        """L, the tokens of a text with both its ends."""
        return self.towers.max_length

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the image tower takes."""
        return self.towers.image_size

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CLIP:
        """Move the model, in place; None leaves as is."""
        self.model.to(device=device, dtype=dtype)
        return self

    def tokenize(self, texts: str | Sequence[str]) -> Tokens:
        """Ids padded to `max_length`; a longer text is cut, with a warning in the log."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("texts must be one string or a list of at least one string")
        tokens, lengths = self.towers.tokenize(texts)
        warn_cut(texts, lengths, self.max_length)
        return tokens

    def text(self, texts: str | Sequence[str] | Tokens, clip_skip: int | None = None) -> TextFeatures:
        """Token states (B, L, D), pooled embedding (B, E) and mask of texts, on the model's device.

        `clip_skip` is diffusers': the token states come from that many layers before the last, then the final
        layer norm; the embedding is always the last layer's.
        """
        tokens = texts if isinstance(texts, Tokens) else self.tokenize(texts)
        tokens = Tokens(to_device(tokens.input_ids, self.device), to_device(tokens.attention_mask, self.device))
        return self.towers.text(tokens, clip_skip)

    def image(self, images: Tensor | Sequence[Image.Image], *, rounded: bool = True) -> Tensor:
        """Embedding (B, E), not normalised, of pixels (B, 3, H, W) in [0, 1] or of Pillow pictures.

        `rounded` False: pixels are not rounded to 8 bits on the way (see `Preprocess.from_pixels`).
        """
        if isinstance(images, Tensor):
            values = self.preprocess.from_pixels(images.to(self.device), rounded=rounded)
        else:
            values = self.preprocess.from_images(images).to(self.device)
        return self.towers.image(values.to(self.dtype))

    @torch.no_grad()
    def score(
        self, images: Tensor | Sequence[Image.Image], texts: str | Sequence[str] | Tokens | TextFeatures
    ) -> Tensor:
        """Cosine of each picture with its text, or with the one text, (B,) float32 on the model's device.

        `images` as for `image`, or embeddings (B, E).
        """
        embedded = isinstance(images, Tensor) and images.ndim == 2
        image = images.to(self.device) if isinstance(images, Tensor) and embedded else self.image(images)
        text = texts if isinstance(texts, TextFeatures) else self.text(texts)
        return cosine(image, text.embedding)

    @torch.no_grad()
    def probability(self, scores: Tensor) -> Tensor | None:
        """How likely a pair of these scores belongs together, by SigLIP's sigmoid (Zhai et al. 2023, section 3.2).

        None for a CLIP that learned by contrast: there a cosine means something beside others alone.
        """
        if self.logit_bias is None:
            return None
        return torch.sigmoid(scores * self.logit_scale.float().exp() + self.logit_bias.float())
