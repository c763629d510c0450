"""The prior: from text to a CLIP image embedding, many candidates at once (Ramesh et al. 2022, section 2.2).

It is a diffusion over (E,) vectors and goes through the same engine as pictures do. It owns the text tower and
which rows there are; the network is asked through `gen.prior_prefix`. It knows nothing of the decoder that paints
the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import PriorTransformer
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.text import TextTower
from gen.conditioning import Condition, Table
from gen.engine import Engine, Row
from gen.prior_prefix import CachedPrior
from gen.request import Candidate
from gen.scheduler import NoiseLevels

STAGE = "prior"


@dataclass(frozen=True, eq=False)
class Prior:
    """A trained prior with the text tower it reads."""

    network: PriorTransformer
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    levels: NoiseLevels

    @property
    def text(self) -> TextTower:
        """The text tower without its projection."""
        return TextTower(self.tokenizer, self.text_encoder.text_model)

    def sample(
        self,
        candidates: Sequence[Candidate],
        max_rows: int | None = None,  # None: all at once
        look: Callable[[Engine], None] | None = None,  # called after every step
    ) -> Tensor:
        """One image embedding per candidate, (B, E) float32, as CLIP's image tower would give it.

        The null is the empty prompt, whatever the candidate's negative prompt, as in diffusers.
        """
        table = Table()
        known: dict[str, int] = {}
        told = sorted({candidate.prompt for candidate in candidates} | {""})
        for text, condition in zip(told, self.conditions(told), strict=True):
            known[text] = table.add(condition)
        rows = [
            Row(
                key=key,
                seed=candidate.seed,
                schedule=self.levels.schedule(self.levels.sampler, candidate.settings.prior_num_inference_steps),
                sampler=self.levels.sampler,
                prompt=known[candidate.prompt],
                null=known[""],
                guidance_scale=candidate.settings.prior_guidance_scale,
                start=candidate.prior_latents,
            )
            for key, candidate in enumerate(candidates)
        ]
        shape, network = (self.network.config.embedding_dim,), CachedPrior(self.network)
        engine = Engine(network, self.levels.scaling, table, STAGE, lambda _: shape, self.network.device)
        found: dict[int, Tensor] = {}
        for finished in engine.run(rows, max_rows):
            found |= {one.row.key: one.x for one in finished}
            if look is not None:
                look(engine)
        embeds = torch.stack([found[key] for key in range(len(rows))])
        return self.network.post_process_latents(embeds).float()

    def conditions(self, texts: Sequence[str]) -> list[Condition]:
        """What the prior is told of each text: token states, text embedding and mask."""
        features = self.text(texts)
        embedding = self.text_encoder.text_projection(features.pooled)  # (B, E)
        tokens, vectors = (told.to(self.network.dtype) for told in (features.tokens, embedding))
        return [Condition(*each) for each in zip(tokens, vectors, features.mask, strict=True)]
