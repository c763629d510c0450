"""The prior: from text to a CLIP image embedding, many candidates at once (Ramesh et al. 2022, section 2.2).

It is a diffusion over (E,) vectors and goes through the same loop over rows as pictures do. It owns the text tower
and which rows there are; the network is asked through `gen.prior_prefix`. It knows nothing of the decoder that paints
the embedding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from diffusers import PriorTransformer
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.device import network_device, weights_dtype
from clip_core.text import TextTower
from gen.candidate import Candidate
from gen.conditioning import Condition, Table, each_read
from gen.prior_prefix import CachedPrior
from gen.row import Row
from gen.rows import Rows
from gen.scheduler import NoiseLevels

STAGE: Final = "prior"
NULLS: Final = "negative_prior"  # whose noise the embeddings of negative prompts draw


@dataclass(frozen=True, eq=False)
class Prior:
    """A trained prior with the text tower it reads."""

    network: PriorTransformer
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    levels: NoiseLevels
    reads_negative: bool = False  # guided away from the negative prompt, whose embedding is the null (Kandinsky)

    @property
    def text(self) -> TextTower:
        """The text tower without its projection."""
        return TextTower(self.tokenizer, self.text_encoder.text_model)

    def sample(self, candidates: Sequence[Candidate], max_rows: int | None = None) -> Tensor:
        """One image embedding per candidate, (B, E) float32, with at most `max_rows` in flight (None: all)."""
        rows = Rows(self.cached_network(), self.levels.scaling, STAGE, network_device(self.network))
        found: dict[Hashable, Tensor] = {}
        for finished in rows.run(self.rows(candidates, range(len(candidates)), Table()), max_rows):
            found |= {one.row.key: one.x for one in finished}
        return self.embeds([found[key] for key in range(len(candidates))])

    @property
    def shape(self) -> tuple[int]:
        """Of a row's x."""
        return (self.network.config.embedding_dim,)

    def required_config(self, width: int, name: str) -> dict[str, tuple[object, object]]:
        """What is given, and what a UNet that reads embeddings of this width needs, by its name."""
        config = self.network.config
        return {
            f"{name} embedding_dim": (config.embedding_dim, width),
            f"{name} num_embeddings": (config.num_embeddings, self.text.shape[0]),
        }

    def cached_network(self) -> CachedPrior:
        """The network as rows ask it."""
        return CachedPrior(self.network)

    def rows(self, candidates: Sequence[Candidate], keys: Sequence[Hashable], table: Table) -> list[Row]:
        """The row of each candidate, by its key.

        The null is the empty prompt, whatever the candidate's negative prompt, unless the prior reads that.
        """
        conditions = self.conditions_of(candidates, table)
        return [
            replace(
                self._row(key, one, conditions[one.settings.plain(one.prompt)]),
                null=conditions[self._null_of(one)],
                guidance_scale=one.settings.prior_guidance_scale,
                start=one.prior_latents,
            )
            for key, one in zip(keys, candidates, strict=True)
        ]

    def null_rows(self, candidates: Sequence[Candidate], keys: Sequence[Hashable], table: Table) -> list[Row]:
        """The row of each candidate's negative prompt, by its key.

        As in diffusers it is guided away from itself, so not at all; its noise is its own.
        """
        conditions = self.conditions_of(candidates, table)
        return [
            replace(self._row(key, one, conditions[self._null_of(one)]), stream=NULLS)
            for key, one in zip(keys, candidates, strict=True)
        ]

    def conditions_of(self, candidates: Sequence[Candidate], table: Table) -> dict[str, Condition]:
        """What it is told by each text that these candidates' rows read."""
        texts = dict.fromkeys(
            text for one in candidates for text in (self._null_of(one), one.settings.plain(one.prompt))
        )
        conditions = table.of(
            [(STAGE, text) for text in texts], lambda names: self.conditions([text for _, text in names])
        )
        return {text: condition for (_, text), condition in conditions.items()}

    def predicts_null(self, candidate: Candidate) -> bool:
        """Whether what this candidate is guided away from is the prior's to say."""
        settings = candidate.settings
        has_negative = bool(settings.negative_prompt) and candidate.negative_image_embeds is None
        return self.reads_negative and settings.prior and has_negative and settings.guidance_scale != 1

    def num_answers(self, candidate: Candidate) -> int:
        """How many embeddings this candidate asks it for."""
        return candidate.settings.num_prior_samples + self.predicts_null(candidate)

    def _null_of(self, candidate: Candidate) -> str:
        return candidate.settings.plain(candidate.settings.negative_prompt) if self.reads_negative else ""

    def _row(self, key: Hashable, candidate: Candidate, prompt: Condition) -> Row:
        return Row(
            key=key,
            seed=candidate.first_seed,
            shape=self.shape,
            schedule=self.levels.schedule(self.levels.sampler, candidate.settings.prior_num_inference_steps),
            sampler=self.levels.sampler,
            prompt=prompt,
            options=self.levels.options(self.levels.sampler),
        )

    def embeds(self, x: Sequence[Tensor]) -> Tensor:
        """Image embeddings (B, E) float32, as CLIP's image tower would give them, of rows (E,) that have finished."""
        return self.network.post_process_latents(torch.stack(list(x))).float()

    def conditions(self, texts: Sequence[str]) -> list[Condition]:
        """What the prior is told of each text: token states, text embedding and mask."""
        return each_read(texts, lambda: self._empty, self._encoded)

    @cached_property
    @torch.no_grad()
    def _empty(self) -> Condition:
        """The empty prompt, which every row is guided away from; encoded once."""
        return self._encoded([""])[0]

    def _encoded(self, texts: Sequence[str]) -> list[Condition]:
        features = self.text(texts)
        embedding = self.text_encoder.text_projection(features.pooled)  # (B, E)
        tokens, vectors = (states.to(weights_dtype(self.network)) for states in (features.tokens, embedding))
        return [Condition(*each) for each in zip(tokens, vectors, features.mask, strict=True)]
