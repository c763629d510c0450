"""A captioner that teaches CLIP's image embedding what its captions say, and is thrown away after training.

Contrast alone is slow to find what both towers would have to find at once, such as which of two objects is left of
the other (Lewis et al. 2022, "Does CLIP Bind Concepts?"). Told the embedding and the words so far, the next word is
a plain classification, and its gradient reaches the picture's tower whatever the text tower knows (Tschannen et al.
2023, "Image Captioners Are Scalable Vision Learners Too"; Yu et al. 2022, CoCa). It knows no CLIP and no data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Captioner(nn.Module):
    """A causal transformer over a caption whose first token is the picture's embedding."""

    def __init__(self, vocab_size: int, max_length: int, embedding_dim: int, num_layers: int) -> None:
        super().__init__()
        self.told = nn.Linear(embedding_dim, embedding_dim)
        self.tokens = nn.Embedding(vocab_size, embedding_dim)
        self.positions = nn.Embedding(max_length, embedding_dim)
        layer = nn.TransformerEncoderLayer(
            embedding_dim,
            nhead=max(1, embedding_dim // 64),
            dim_feedforward=4 * embedding_dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(embedding_dim), enable_nested_tensor=False)
        self.words = nn.Linear(embedding_dim, vocab_size)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy per token of captions (B, L), True in `mask` where there is text, from embeddings (B, E).

        The first id begins the text and is told by nobody: the embedding's direction, which is all that CLIP
        compares, stands in its place.
        """
        direction = F.normalize(image, dim=-1) * image.shape[-1] ** 0.5
        x = torch.cat([self.told(direction)[:, None], self.tokens(ids[:, 1:-1])], dim=1)  # (B, L - 1, E)
        length = x.shape[1]
        x = x + self.positions.weight[:length]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        logits = self.words(self.layers(x, mask=causal, is_causal=True))  # (B, L - 1, V)
        meant = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), meant.flatten(), ignore_index=-100)
