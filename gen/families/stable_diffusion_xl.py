"""Stable Diffusion XL: two text towers, and the picture's size told beside the words; and its refiner.

Token states are the last but one layer's of both towers side by side, without a final norm; the second tower's pooled
embedding and six numbers of pixels (size before cropping, where it was cropped, size asked for) go in with the timestep
(Podell et al. 2023, section 2.2). The refiner has the second tower alone, is told an aesthetic score in place of the
size asked for, and knows low noise levels alone, so it paints from a picture (section 2.5). The empty prompt is zeros
where model_index.json says so. The autoencoder overflows in float16 and is kept in float32 then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.text import TextPiece, TextTower
from gen.checkpoint import Parts
from gen.conditioning import Condition, Conditions
from gen.families.autoencoder import KLModel
from gen.families.base import listed, own
from gen.families.reader import Reader, check_length
from gen.model_index import IMAGE_PARTS
from gen.scheduler import NoiseLevels
from gen.settings import JSON, Abilities, Settings

FIRST = ("tokenizer", "text_encoder")  # the first text tower's parts, which the refiner has not
FORCE_ZEROS, SCORED = "force_zeros_for_empty_prompt", "requires_aesthetics_score"
SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}  # as stock's classes tell them


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StableDiffusionXL(KLModel, Reader):
    """A loaded Stable Diffusion XL, base or refiner; `text` of a model with the second tower alone is that one."""

    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    empty_is_zeros: bool = True  # whether the empty prompt is zeros, or what the towers say of it
    tells_score: bool = False  # whether the UNet is told an aesthetic score in place of the size asked for: a refiner

    SAVED_AS: ClassVar[str] = "StableDiffusionXLPipeline"
    INPAINTS_AS: ClassVar[str | None] = "StableDiffusionXLInpaintPipeline"
    REFINES_AS: ClassVar[str] = "StableDiffusionXLImg2ImgPipeline"
    STRENGTH: ClassVar[float] = 0.3
    MASK_STRENGTH: ClassVar[float] = 0.9999  # all steps but the first, so from a trace of the picture
    STOCK_DEFAULTS: ClassVar[dict[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 5.0}

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        first = [] if parts.modules.keys().isdisjoint(FIRST) else FIRST
        got = listed(parts, ["unet", "vae", *first, "tokenizer_2", "text_encoder_2", "scheduler"])
        vae, second = got["vae"], TextTower(got["tokenizer_2"], got["text_encoder_2"].text_model)
        model = cls(
            unet=got["unet"],
            vae=vae.float() if vae.dtype == torch.float16 and vae.config.force_upcast else vae,
            text=TextTower(got["tokenizer"], got["text_encoder"]) if first else second,
            levels=NoiseLevels.of(got["scheduler"], str(parts.folder / "scheduler")),
            tokenizer_2=got["tokenizer_2"],
            text_encoder_2=got["text_encoder_2"],
            empty_is_zeros=parts.options.get(FORCE_ZEROS, True),
            tells_score=parts.options.get(SCORED, False),
            clip=parts.clip,
            card=parts.card,
        )
        model.check(str(parts.folder))
        return model

    @property
    def text_2(self) -> TextTower:
        """The second text tower without its projection."""
        return TextTower(self.tokenizer_2, self.text_encoder_2.text_model)

    @property
    def towers(self) -> list[TextTower]:
        """What reads a text, in the order in which the UNet is told their states."""
        return [self.text_2] if self.text.encoder is self.text_encoder_2.text_model else [self.text, self.text_2]

    @property
    def has_first(self) -> bool:
        """Whether there are both text towers."""
        return len(self.towers) == 2

    @property
    def text_width(self) -> int:
        """D of the token states that the UNet reads: of all towers."""
        return sum(tower.shape[1] for tower in self.towers)

    @property
    def pooled_width(self) -> int:
        """P of the pooled text embedding."""
        return self.text_encoder_2.config.projection_dim

    @property
    def saved_as(self) -> str:
        """The pipeline class of model_index.json."""
        return self.REFINES_AS if self.tells_score and not self.adds_mask else super().saved_as

    @property
    def index(self) -> dict[str, JSON]:
        """What model_index.json says beside the parts."""
        left_out = (*IMAGE_PARTS, *(() if self.has_first else FIRST))
        missing: dict[str, JSON] = {name: [None, None] for name in left_out}
        scored: dict[str, JSON] = {} if self.saved_as == self.SAVED_AS else {SCORED: self.tells_score}
        return missing | scored | {FORCE_ZEROS: self.empty_is_zeros}

    @property
    def stock_defaults(self) -> dict[str, Any]:
        """What stock's class paints with when it is told nothing."""
        guidance = {"guidance_scale": 7.5} if self.adds_mask else {}
        return super().stock_defaults | guidance | (SCORES if self.tells_score else {})

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        known = super().parts() | {"tokenizer_2": self.tokenizer_2, "text_encoder_2": self.text_encoder_2}
        return known if self.has_first else {name: part for name, part in known.items() if name not in FIRST}

    def with_own_texts(self) -> Self:
        """The same with text towers that CLIP does not share, so that they alone can be changed."""
        own = replace(super().with_own_texts(), text_encoder_2=self.unshared(self.text_encoder_2))
        return own if self.has_first else replace(own, text=own.text_2)

    def check(self, where: str) -> None:
        """Refuse parts that do not fit each other (ValueError), before a network finds out."""
        super().check(where)
        check_length(self.text_2, where, "text_encoder_2")

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        config = self.unet.config
        required = super().required_config()
        required["unet addition_embed_type"] = (config.addition_embed_type, "text_time")
        required["unet time_cond_proj_dim"] = (config.time_cond_proj_dim, None)
        required["unet class_embed_type"] = (config.class_embed_type, None)
        required["tokenizer_2 model_max_length"] = (self.text_2.shape[0], self.text.shape[0])
        num_sizes = 5 if self.tells_score else 6
        added = self.pooled_width + num_sizes * (config.addition_time_embed_dim or 0)
        required["unet projection_class_embeddings_input_dim"] = (config.projection_class_embeddings_input_dim, added)
        return required

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        layers = min(tower.encoder.config.num_hidden_layers for tower in self.towers)
        # one layer less, for the last is never read
        abilities = replace(super().make_abilities(), pooled_width=self.pooled_width, text_layers=layers - 1)
        conditioned = replace(abilities, tells_sizes=True, tells_score=self.tells_score)
        return replace(conditioned, has_second_text=self.has_first, needs_picture=self.tells_score)

    def read(
        self,
        texts: Sequence[str | TextPiece],
        clip_skip: int | None,
        texts_2: Sequence[str | TextPiece] | None = None,  # what a second text tower reads; None: the same
    ) -> list[Condition]:
        """What the UNet is told of each of these texts; the second tower reads the same or its own."""
        layer = 1 + (clip_skip or 0)
        texts_2 = texts if texts_2 is None else texts_2
        second = self.text_2(texts_2, layer, normed=False)
        tokens = second.tokens  # (B, L, D)
        if self.has_first:
            tokens = torch.cat([self.text(texts, layer, normed=False).tokens, tokens], dim=-1)
        pooled = self.text_encoder_2.text_projection(second.pooled)  # (B, P)
        if self.empty_is_zeros:
            for place in (place for place, both in enumerate(zip(texts, texts_2, strict=True)) if not any(both)):
                tokens[place], pooled[place] = 0, 0
        return [self.handed(*each) for each in zip(tokens, pooled, strict=True)]

    def handed(self, tokens: Tensor, pooled: Tensor | None = None) -> Condition:
        """What the UNet is told of a text with these token states (L, D) and this pooled embedding (P,)."""
        assert pooled is not None, "a request with embeddings of one kind is refused"
        return replace(super().handed(tokens), pooled_projections=own(pooled, self.unet))

    def time_ids(self, settings: Settings, of_null: bool = False) -> tuple[float, ...]:
        """What the UNet is told of a picture's size: by default never scaled and never cropped, as stock says.

        Of the null it is what is told of the prompt, where nothing else was said.
        """
        size = (settings.height, settings.width)
        original, target = settings.original_size or size, settings.target_size or size
        cropped, score = settings.crops_coords_top_left or (0, 0), settings.aesthetic_score
        if of_null:
            original, target = settings.negative_original_size or original, settings.negative_target_size or target
            cropped, score = settings.negative_crops_coords_top_left or cropped, settings.negative_aesthetic_score
        if not self.tells_score:
            return (*original, *cropped, *target)
        assert score is not None, "the model's defaults have one"
        return (*original, *cropped, score)

    def unet_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """What the UNet is told beside the token states, by the names of its arguments."""
        return {"added_cond_kwargs": {"text_embeds": conditions.pooled_projections, "time_ids": conditions.time_ids}}
