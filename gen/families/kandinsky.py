"""Kandinsky 2: a UNet that reads CLIP image embeddings, by a prior (Razzhigaev et al. 2023).

The prior turns the prompt into an image embedding, guided away from the negative prompt. The UNet is guided away from
the embedding that the prior gives the negative prompt, or without one from what CLIP says of an empty picture. A
decoder without a prior takes both embeddings from the caller. In 2.2 the UNet reads the embedding alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from clip_core.clip import CLIP
from clip_core.device import weights_dtype
from clip_core.join import joined
from clip_core.preprocess import Preprocess
from gen.attention.network import reading
from gen.candidate import Candidate
from gen.checkpoint import Parts
from gen.conditioning import Condition, ConditionPair, Conditions, Table
from gen.edit import Beside, EncodedImage, Posterior
from gen.families.autoencoder import MoVQModel
from gen.families.base import listed, own
from gen.model_index import JOINED
from gen.prior import Prior
from gen.scheduler import NoiseLevels
from gen.settings import Abilities
from gen.source import Filter


@dataclass(frozen=True, eq=False, repr=False)
class ImagePrior:
    """Kandinsky's prior with the image tower beside it."""

    prior: Prior
    image_encoder: CLIPVisionModelWithProjection
    image_processor: CLIPImageProcessor

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Of a folder's parts, each by its name with `prior_` before it."""
        names = ("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor")
        got = listed(parts, [f"prior_{name}" for name in names])
        levels = NoiseLevels.of(got["prior_scheduler"], str(parts.place("prior_scheduler")))
        text = (got["prior_tokenizer"], got["prior_text_encoder"])
        prior = Prior(got["prior_prior"], *text, levels, reads_negative=True)
        return cls(prior, got["prior_image_encoder"], got["prior_image_processor"])

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return {
            "prior_prior": self.prior.network,
            "prior_image_encoder": self.image_encoder,
            "prior_text_encoder": self.prior.text_encoder,
            "prior_tokenizer": self.prior.tokenizer,
            "prior_scheduler": self.prior.levels.stock,
            "prior_image_processor": self.image_processor,
        }

    def required_config(self, width: int) -> dict[str, tuple[object, object]]:
        """What is given, and what a UNet that reads embeddings of this width needs, by its name."""
        return self.prior.required_config(width, "prior_prior") | {
            "prior_text_encoder projection_dim": (self.prior.text_encoder.config.projection_dim, width),
            "prior_image_encoder projection_dim": (self.image_encoder.config.projection_dim, width),
        }

    def clip(self) -> CLIP:
        """The whole CLIP that its towers make."""
        preprocess = Preprocess.from_config(self.image_processor.to_dict())
        return joined(self.prior.text_encoder, self.image_encoder, self.prior.tokenizer, preprocess)

    @cached_property
    @torch.no_grad()
    def empty(self) -> Tensor:
        """CLIP's embedding (E,) of a picture of nothing: zeros as the tower takes them, its mean colour."""
        size = self.image_encoder.config.image_size
        nothing = torch.zeros(1, 3, size, size, dtype=self.image_encoder.dtype, device=self.image_encoder.device)
        return self.image_encoder(nothing).image_embeds[0]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Kandinsky(MoVQModel):
    """A loaded Kandinsky 2 of either kind."""

    image_prior: ImagePrior | None = None

    STRENGTH: ClassVar[float] = 0.3
    RESIZED_BY: ClassVar[Filter] = Filter(Image.Resampling.BICUBIC, reducing_gap=1.0)
    HOLDS: ClassVar[bool]  # whether what is known is held although a UNet for inpainting is told it
    ASKS: ClassVar[dict[str, str]]  # what its UNet's configuration has to say
    STOCK_DEFAULTS: ClassVar[dict[str, Any]] = {
        "height": 512,
        "width": 512,
        "num_inference_steps": 100,
        "guidance_scale": 4.0,
        "prior_num_inference_steps": 25,
        "prior_guidance_scale": 4.0,
    }

    # --- what differs between the two ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def embedding_width(self) -> int:
        """E of the image embedding."""

    @abstractmethod
    def words(self, texts: Sequence[str]) -> list[Condition]:
        """What the UNet is told of each of these texts, before it is shown an image embedding."""

    @abstractmethod
    def pictured(self, words: Condition, image_embeds: Tensor) -> Condition:
        """The same with an image embedding (E,)."""

    @abstractmethod
    def added_cond_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """The UNet's `added_cond_kwargs`."""

    # --- what they share -----------------------------------------------------------------------------------------

    @classmethod
    def with_prior(cls, parts: Parts, **own_parts: Any) -> Self:
        """Put what both have together with what is the family's own; ValueError as `of`."""
        got, folder = listed(parts, ["unet", "movq", "scheduler"]), str(parts.folder)
        levels = NoiseLevels.of(got["scheduler"], str(parts.folder / "scheduler"))
        # learned, whether or not the scheduler reads it
        learned = got["unet"].config.out_channels == 2 * got["movq"].config.latent_channels
        image_prior = ImagePrior.of(parts) if "prior_prior" in parts.modules else None
        model = cls(
            unet=got["unet"],
            movq=got["movq"],
            levels=replace(levels, scaling=replace(levels.scaling, learned_range=learned)),
            image_prior=image_prior,
            card=parts.card,
            clip=parts.clip,
            **own_parts,
        )
        model.check(folder)
        if image_prior is None or parts.clip is not None:
            return model
        return replace(model, clip=image_prior.clip())

    @property
    def prior(self) -> Prior | None:
        """What turns a text into an image embedding first; None: nothing does."""
        return None if self.image_prior is None else self.image_prior.prior

    @property
    def saved_as(self) -> str:
        """The pipeline class of model_index.json."""
        alone = super().saved_as
        return alone if self.image_prior is None else JOINED[alone].both

    @property
    def clip_beside(self) -> CLIP | None:
        """The CLIP that is not of the prior's own towers."""
        if self.clip is None or self.image_prior is None:
            return self.clip
        is_own = getattr(self.clip.model, "vision_model", None) is self.image_prior.image_encoder.vision_model
        return None if is_own else self.clip

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | ({} if self.image_prior is None else self.image_prior.parts())

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        config = self.unet.config
        asked: dict[str, str | None] = {**self.ASKS, "class_embed_type": None, "time_cond_proj_dim": None}
        required: dict[str, tuple[object, object]]
        required = {f"unet {name}": (getattr(config, name), needed) for name, needed in asked.items()}
        channels = self.latent_channels * (2 if self.levels.scaling.learned_range else 1)
        required["unet out_channels"] = (config.out_channels, channels)
        own_parts = {} if self.image_prior is None else self.image_prior.required_config(self.embedding_width)
        return required | super().required_config() | own_parts

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        return replace(
            super().make_abilities(),
            needs_image=True,
            takes_null_image=True,
            has_null_image=self.prior is not None,
            prior_reads_negative=True,
        )

    def read_masked(self, pixels: Tensor, white: Tensor, image: Posterior, is_painted: Tensor) -> EncodedImage:
        """The UNet is told the picture's latents where they are known, and then where that is."""
        is_painted = widened(is_painted)
        is_known = (~is_painted).float()
        beside = Beside(Posterior(image.mean * is_known), is_known, mask_first=False)
        return EncodedImage(image, is_painted, self.HOLDS, beside)

    def encode_prompts(self, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
        """What each candidate is told before any prior has spoken; all who are told the same share a condition."""
        guided = [one.settings.negative_prompt for one in candidates if one.settings.guidance_scale != 1]
        conditions = self._word_conditions([*guided, *(one.prompt for one in candidates)], table)
        given: dict[tuple[str, int], Condition] = {}  # by what is said, and by identity

        def shown(text: str, embeds: Tensor | None) -> Condition:
            if embeds is None:
                return conditions[text]
            if (text, id(embeds)) not in given:
                given[text, id(embeds)] = self.pictured(conditions[text], embeds.to(self.device, torch.float32))
            return given[text, id(embeds)]

        pairs: list[ConditionPair] = []
        for one in candidates:
            null, negative = None, one.settings.negative_prompt
            if one.settings.guidance_scale != 1:
                by_itself = one.negative_image_embeds is None and not self._asks_for_null(one)
                null = self._empty(conditions[negative], negative, table) if by_itself else None
                null = null or shown(negative, one.negative_image_embeds)
            pairs.append((shown(one.prompt, one.image_embeds), null))
        return pairs

    def _asks_for_null(self, candidate: Candidate) -> bool:
        return self.prior is not None and self.prior.predicts_null(candidate)

    def _empty(self, words: Condition, text: str, table: Table) -> Condition:
        """What is guided away from where there is no embedding of a negative prompt: nothing to be seen."""
        assert self.image_prior is not None, "a request that lacks the embedding is refused"
        embeds = self.image_prior.empty.float()
        return table.of([("nothing to be seen", text)], lambda _: [self.pictured(words, embeds)])[
            "nothing to be seen", text
        ]

    def _word_conditions(self, texts: Sequence[str], table: Table) -> dict[str, Condition]:
        """What is told of these texts alone."""
        names = [("words", text) for text in dict.fromkeys(texts)]
        conditions = table.of(names, lambda missing: self.words([text for _, text in missing]))
        return {text: condition for (_, text), condition in conditions.items()}

    def add_image_embeds(
        self, candidates: Sequence[Candidate], conditions: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """What candidates are told in words, with an image embedding (E,) beside it."""
        return [self.pictured(words, embeds) for words, embeds in zip(conditions, image_embeds, strict=True)]

    def call_unet(self, network: UNet2DConditionModel, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """What a UNet says of (M, C, h, w) noisy latents."""

        def states(read: list[Condition]) -> Tensor:
            of = Conditions(tuple(read))
            return network.process_encoder_hidden_states(of.encoder_hidden_states, self.added_cond_kwargs(of))

        return network(
            conditions.beside(x).to(weights_dtype(network)),
            timestep,
            encoder_hidden_states=conditions.encoder_hidden_states,
            added_cond_kwargs=self.added_cond_kwargs(conditions),
            cross_attention_kwargs=reading(network, conditions.distinct, states),
            return_dict=False,
        )[0]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Kandinsky22(Kandinsky):
    """A loaded Kandinsky 2.2: the embedding as 32 tokens and beside the timestep, and no words."""

    SAVED_AS: ClassVar[str] = "KandinskyV22Pipeline"
    INPAINTS_AS: ClassVar[str | None] = "KandinskyV22InpaintPipeline"
    HOLDS: ClassVar[bool] = True
    ASKS: ClassVar[dict[str, str]] = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        return cls.with_prior(parts)

    @property
    def embedding_width(self) -> int:
        """E of the image embedding."""
        return self.unet.config.encoder_hid_dim

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        return replace(super().make_abilities(), reads_text=False)

    def words(self, texts: Sequence[str]) -> list[Condition]:
        """Nothing: words reach the prior alone."""
        return [Condition() for _ in texts]

    def pictured(self, words: Condition, image_embeds: Tensor) -> Condition:
        """What the UNet is told of an image embedding (E,)."""
        return replace(words, pooled_projections=own(image_embeds, self.unet))

    def added_cond_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """The UNet's `added_cond_kwargs`."""
        return {"image_embeds": conditions.pooled_projections}


def widened(is_painted: Tensor) -> Tensor:
    """A mask (1, h, w) bool and the cells that touch it, of those at its corners two: as the UNets were shown it."""
    wider = is_painted.clone()
    for here, there in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        wider[:, here] |= is_painted[:, there]
        wider[:, :, here] |= is_painted[:, :, there]
        wider[:, here, here] |= is_painted[:, there, there]
    return wider
