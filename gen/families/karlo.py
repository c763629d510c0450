"""Karlo, the unCLIP of Ramesh et al. 2022: image embeddings painted as pixels, small and then large.

A prior, where there is one, says what image embedding goes with a text. The decoder's UNet reads the text's states
behind a few tokens made of that embedding, and the sum of both embeddings goes in with the timestep; text_proj makes
all of it. No image is an embedding of its own that was learned for it, and null is the empty (or negative) prompt with
no image. The decoder paints 64 x 64 pixels and says how much noise to add; two further UNets enlarge them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, ClassVar, NamedTuple, Self

import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from clip_core.device import weights_dtype
from clip_core.text import TextPiece, TextTower
from gen.candidate import Candidate
from gen.checkpoint import Parts
from gen.conditioning import Condition, ConditionPair, Conditions, Table
from gen.embeds import slerp
from gen.families.base import listed, own, with_images
from gen.families.reader import Reader
from gen.model_index import IMAGE_PARTS
from gen.prior import Prior
from gen.scheduler import NoiseLevels
from gen.settings import JSON, Abilities, Settings
from gen.upscale import Upscaler

VARIATIONS = "UnCLIPImageVariationPipeline"  # has no prior


class TextEncoding(NamedTuple):
    """What the text tower says of a text."""

    states: Tensor  # (L, D)
    embedding: Tensor  # (E,)
    mask: Tensor  # (L,) bool, True where there is text


@dataclass(frozen=True, eq=False, kw_only=True)
class Illustrated(Condition):
    """What the UNet is told of a text and an image, and what was read of the text, to put another image beside it."""

    read: TextEncoding


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Karlo(Reader):
    """A loaded Karlo; one without a prior paints variations of pictures."""

    text_encoder: CLIPTextModelWithProjection
    text_proj: UnCLIPTextProjModel
    super_res: Upscaler
    prior: Prior | None = None

    SAVED_AS: ClassVar[str] = "UnCLIPPipeline"
    STOCK_DEFAULTS: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 25,
        "guidance_scale": 8.0,
        "prior_num_inference_steps": 25,
        "prior_guidance_scale": 4.0,
        "super_res_num_inference_steps": 7,
    }

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        needed = ["decoder", "tokenizer", "text_encoder", "text_proj", "super_res_first", "super_res_last"]
        needed += ["decoder_scheduler", "super_res_scheduler"]
        if parts.family != VARIATIONS:
            needed += ["prior", "prior_scheduler"]
        got = listed(parts, needed)

        def levels(name: str) -> NoiseLevels:
            return NoiseLevels.of(got[name], str(parts.folder / name))

        model = cls(
            unet=got["decoder"],
            text=TextTower(got["tokenizer"], got["text_encoder"].text_model),
            levels=levels("decoder_scheduler"),
            text_encoder=got["text_encoder"],
            text_proj=got["text_proj"],
            super_res=Upscaler(got["super_res_first"], got["super_res_last"], levels("super_res_scheduler")),
            image_encoder=parts.modules.get("image_encoder"),
            feature_extractor=parts.modules.get("feature_extractor"),
            clip=parts.clip,
            card=parts.card,
        )
        if "prior" in needed:
            text = got["tokenizer"], got["text_encoder"]
            model = replace(model, prior=Prior(got["prior"], *text, levels("prior_scheduler")))
        model.check(str(parts.folder))
        return model

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        parts = {
            "decoder": self.unet,
            "tokenizer": self.text.tokenizer,
            "text_encoder": self.text_encoder,
            "text_proj": self.text_proj,
            "super_res_first": self.upscaler.first,
            "super_res_last": self.upscaler.last,
            "decoder_scheduler": self.levels.stock,
            "super_res_scheduler": self.upscaler.levels.stock,
        }
        if self.prior is not None:
            parts |= {"prior": self.prior.network, "prior_scheduler": self.prior.levels.stock}
        return parts | self.image_parts

    def with_own_texts(self) -> Self:
        """The same, with a text tower that CLIP does not share; the prior reads by it too, for a folder has one."""
        text_encoder = self.unshared(self.text_encoder)
        return replace(
            self,
            text_encoder=text_encoder,
            text=replace(self.text, encoder=text_encoder.text_model),
            prior=None if self.prior is None else replace(self.prior, text_encoder=text_encoder),
        )

    def check(self, where: str) -> None:
        """Refuse parts that do not fit each other (ValueError), before a network finds out."""
        networks = {"decoder": self.unet, "super_res_first": self.upscaler.first, "super_res_last": self.upscaler.last}
        for name, network in networks.items():
            if not isinstance(network.config.sample_size, int):
                raise ValueError(f"{where}: {name} sample_size is {network.config.sample_size}; it has to be a number")
        super().check(where)

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        decoder, proj, channels = self.unet.config, self.text_proj.config, self.latent_channels
        width = self.embedding_width
        required: dict[str, tuple[object, object]] = {
            "decoder cross_attention_dim": (decoder.cross_attention_dim, proj.cross_attention_dim),
            "decoder class_embed_type": (decoder.class_embed_type, "identity"),
            "decoder out_channels": (decoder.out_channels, channels * (1 + self.levels.scaling.learned_range)),
            "text_encoder hidden_size": (self.text_encoder.config.hidden_size, width),
            "text_encoder projection_dim": (self.text_encoder.config.projection_dim, width),
            "text_proj time_embed_dim": (proj.time_embed_dim, self.unet.time_embedding.linear_2.out_features),
        }
        for name, network in (("super_res_first", self.upscaler.first), ("super_res_last", self.upscaler.last)):
            config, learned = network.config, self.upscaler.levels.scaling.learned_range
            required[f"{name} in_channels"] = (config.in_channels, 2 * channels)  # x, and the small picture enlarged
            required[f"{name} out_channels"] = (config.out_channels, channels * (1 + learned))
            required[f"{name} sample_size"] = (config.sample_size, max(self.factor, 1) * decoder.sample_size)
        return required if self.prior is None else required | self.prior.required_config(width, "prior")

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        abilities = super().make_abilities()
        # both UNets halve a picture that often, and double it again
        halved = [network.config.block_out_channels for network in (self.unet, self.upscaler.first)]
        small, large = (2 ** (len(blocks) - 1) for blocks in halved)
        return replace(
            abilities,
            size_multiple=lcm(self.factor * small, large),
            text_shape=None,
            needs_image=self.prior is None,
        )

    @property
    def saved_as(self) -> str:
        """The pipeline class of model_index.json."""
        return VARIATIONS if self.prior is None else self.SAVED_AS

    @property
    def index(self) -> dict[str, JSON]:
        """What model_index.json says beside the parts."""
        return {name: [None, None] for name in IMAGE_PARTS} if self.prior is None and not self.image_parts else {}

    @property
    def upscaler(self) -> Upscaler:
        """What paints large pictures from the UNet's."""
        return self.super_res

    @property
    def embedding_width(self) -> int:
        """E of texts and images."""
        return self.text_proj.config.clip_embeddings_dim

    @property
    def factor(self) -> int:
        """Pixels of a large picture per pixel of the decoder's, along each side."""
        return self.upscaler.first.config.sample_size // self.unet.config.sample_size

    @property
    def latent_channels(self) -> int:
        """3, of pixels."""
        return self.unet.config.in_channels

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1], small or large ones, to pixels in [0, 1]."""
        return (latents.float() / 2 + 0.5).clamp(0, 1)

    def preview(self, latents: Tensor) -> Tensor:
        """The small picture itself."""
        return self.decode(latents)

    def is_small(self, settings: Settings) -> bool:
        """False: what a search sees is not what super resolution makes of it."""
        return False

    # --- what the UNet is told ---------------------------------------------------------------------------------------

    def read(
        self,
        texts: Sequence[str | TextPiece],
        clip_skip: int | None,
        texts_2: Sequence[str | TextPiece] | None = None,  # what a second text tower reads; None: the same
    ) -> list[Condition]:
        """What the UNet is told of each of these texts without an image."""
        features = self.text(texts, clip_skip)
        embeddings = self.text_encoder.text_projection(features.pooled)  # (B, E)
        return self._without(
            [TextEncoding(*each) for each in zip(features.tokens, embeddings, features.mask, strict=True)]
        )

    def joined(self, pieces: Sequence[TextPiece], read: Sequence[Condition]) -> Condition:
        """What the UNet is told of a text that was read in these pieces."""
        encodings, empty = [each.read for each in read if isinstance(each, Illustrated)], self._empty
        assert len(encodings) == len(read) and isinstance(empty, Illustrated), "every text was read here"
        states = self.apply_prompt_weights(pieces, [each.states for each in encodings], empty.read.states)
        mask = torch.cat([each.mask for each in encodings])
        return self._without([TextEncoding(states.to(empty.read.states.dtype), encodings[0].embedding, mask)])[0]

    def encode_prompts(self, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
        """What each candidate is told before any prior has spoken: its words, and the image embedding it came with."""
        return with_images(self, candidates, super().encode_prompts(candidates, table), self.device)

    def add_image_embeds(
        self, candidates: Sequence[Candidate], conditions: Sequence[Condition], image_embeds: Sequence[Tensor]
    ) -> list[Condition]:
        """What each candidate is told in words, with an image embedding (E,) beside it."""
        read = [each.read for each in conditions if isinstance(each, Illustrated)]
        assert len(read) == len(conditions), "every text was read here"
        return self._beside(read, torch.stack(list(image_embeds)))

    def between(self, start: Condition, end: Condition, share: float) -> Condition:
        """What the UNet is told between two texts: as it is told one, of what the text tower says between them."""
        assert isinstance(start, Illustrated) and isinstance(end, Illustrated), "every text was read here"
        one, other = start.read, end.read
        states, embedding = slerp(one.states, other.states, share), slerp(one.embedding, other.embedding, share)
        mask = one.mask | other.mask if 0 < share < 1 else (one.mask, other.mask)[round(share)]
        return self._without([TextEncoding(states, embedding, mask)])[0]

    def unet_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """What the UNet is told beside the tokens, by the names of its arguments."""
        return {"class_labels": conditions.pooled_projections, "attention_mask": conditions.attention_mask}

    def _without(self, read: Sequence[TextEncoding]) -> list[Condition]:
        """What the UNet is told of texts without an image."""
        nothing = self.text_proj.learned_classifier_free_guidance_embeddings  # (E,)
        return self._beside(read, nothing.expand(len(read), -1))

    def _beside(self, read: Sequence[TextEncoding], image_embeds: Tensor) -> list[Condition]:
        """What the UNet is told of texts and of the image embeddings (B, E) beside them."""
        if len({len(each.states) for each in read}) > 1:  # texts of unequally many pieces
            alone = zip(read, image_embeds, strict=True)
            return [condition for each, embedding in alone for condition in self._beside([each], embedding[None])]
        states, embeddings, masks = (torch.stack(each) for each in zip(*read, strict=True))
        tokens, vectors = self.text_proj(
            image_embeddings=image_embeds.to(weights_dtype(self.text_proj)),
            prompt_embeds=embeddings,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=False,  # null has rows of its own
        )  # (B, K + L, X): the image's K tokens come first; (B, V)
        seen = F.pad(masks, (tokens.shape[1] - masks.shape[1], 0), value=True)
        made = zip(tokens, vectors, seen, read, strict=True)
        return [
            Illustrated(
                encoder_hidden_states=own(text, self.unet),
                pooled_projections=own(vector, self.unet),
                attention_mask=mask,
                read=each,
            )
            for text, vector, mask, each in made
        ]
