"""Families whose UNet reads the prompt by cross-attention: how texts become what it is told.

A text tower's states are told as they are; a family may read its texts otherwise, or tell the UNet more. All who are
told the same share a condition, and the empty prompt is encoded once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from clip_core.device import to_device, weights_dtype
from clip_core.text import TextPiece, TextTower
from clip_core.wording import quoted
from gen.adapters.ip_adapter import IPAdapter
from gen.attention.network import reading, seeing
from gen.candidate import Candidate
from gen.conditioning import Condition, ConditionPair, Conditions, Table, in_turns
from gen.families.base import FamilyModel, own
from gen.prompts import parse
from gen.settings import Abilities, Settings
from gen.traced import is_stood_in

logger = logging.getLogger(__name__)


class PromptSpec(NamedTuple):
    """What a candidate is told in words; all who are told equal ones share a condition."""

    text: str
    clip_skip: int | None = None  # layers of the text tower left out
    time_ids: tuple[float, ...] = ()  # SDXL's, as the UNet takes them; empty: it takes none
    pieces: tuple[TextPiece, ...] = ()  # as which the text is read, one by one; empty: it is read whole
    text_2: str | None = None  # what a second text tower reads; None: the same text


EMPTY = PromptSpec("")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Reader(FamilyModel):
    """A loaded model of any of these families."""

    text: TextTower
    ip_adapter: IPAdapter | None = None  # what shows the UNet a picture beside the text; None: nothing does

    # --- a family's own ------------------------------------------------------------------------------------------

    @property
    def text_width(self) -> int:
        """D of the token states that the UNet reads."""
        return self.text.shape[1]

    def parts(self) -> dict[str, Any]:
        """Modules, tokenizers and schedulers by their names in model_index.json."""
        return super().parts() | {"tokenizer": self.text.tokenizer, "text_encoder": self.text.encoder}

    def modules(self) -> list[nn.Module]:
        """All networks that it is made of; some may share layers."""
        adapter = self.ip_adapter
        beside = [] if adapter is None else [adapter.projection]
        beside += [] if adapter is None or adapter.encoder is None else [adapter.encoder.tower]
        return [*super().modules(), *beside]

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        widths = (self.unet.config.cross_attention_dim, self.text_width)
        return {"unet cross_attention_dim": widths} | super().required_config()

    def make_abilities(self) -> Abilities:
        """What a request may ask for, and what it gets when it does not say."""
        layers = self.text.encoder.config.num_hidden_layers
        shape = (self.text.shape[0], self.text_width)
        abilities = replace(super().make_abilities(), text_shape=shape, text_layers=layers)
        if self.ip_adapter is None:
            return abilities
        sees = self.ip_adapter.encoder is not None
        return replace(abilities, ip_adapter_shape=self.ip_adapter.shape, ip_adapter_sees=sees)

    def read(
        self,
        texts: Sequence[str | TextPiece],
        clip_skip: int | None,
        texts_2: Sequence[str | TextPiece] | None = None,  # what a second text tower reads; None: the same
    ) -> list[Condition]:
        """What the UNet is told of each of these texts."""
        return [self.handed(tokens) for tokens in self.text(texts, clip_skip).tokens]

    def joined(self, pieces: Sequence[TextPiece], read: Sequence[Condition]) -> Condition:
        """What the UNet is told of a text that was read in these pieces."""
        empty = self._empty.encoder_hidden_states
        states = self.apply_prompt_weights(pieces, [each.encoder_hidden_states for each in read], empty)
        return replace(read[0], encoder_hidden_states=own(states, self.unet))

    def handed(self, tokens: Tensor, pooled: Tensor | None = None) -> Condition:
        """What the UNet is told of a text with these token states (L, D), and where it takes it pooled, (P,)."""
        return Condition(own(tokens, self.unet))

    def time_ids(self, settings: Settings, of_null: bool = False) -> tuple[float, ...]:
        """What the UNet is told of a picture's size beside the prompt, or beside the null; empty: nothing."""
        return ()

    def unet_kwargs(self, conditions: Conditions) -> dict[str, Any]:
        """What the UNet is told beside the token states, by the names of its arguments."""
        return {}

    def with_own_texts(self) -> Self:
        """The same, with text towers that neither CLIP nor a prior shares, so that they alone can be changed."""
        return replace(super().with_own_texts(), text=replace(self.text, encoder=self.unshared(self.text.encoder)))

    # --- what all share ------------------------------------------------------------------------------------------

    def see_beside(self, pixels: Tensor) -> Tensor:
        """What the IP-Adapter reads of pixels (3, H, W) in [0, 1]: (E,) or (S, E) float32."""
        assert self.ip_adapter is not None, "a picture is refused where there is none"
        return self.ip_adapter.embed(pixels)

    def check(self, where: str) -> None:
        """Refuse parts that do not fit each other (ValueError), before a network finds out."""
        super().check(where)
        check_length(self.text, where, "text_encoder")

    def encode_prompts(self, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
        """What each candidate is told in words."""
        handed: dict[int, Condition] = {}  # by identity
        for one in candidates:
            for embeds, pooled, of_null in (
                (one.prompt_embeds, one.pooled_prompt_embeds, False),
                (one.negative_prompt_embeds, one.negative_pooled_prompt_embeds, True),
            ):
                if embeds is not None and id(embeds) not in handed:
                    time_ids = self.time_ids(one.settings, of_null)
                    handed[id(embeds)] = self._with_time_ids(self.handed(embeds, pooled), time_ids)
        asked = dict.fromkeys(words for candidate in candidates for words in self._read_for(candidate))
        known = table.of(list(asked), self._encoded)

        def condition_of(embeds: Tensor | None, words: PromptSpec) -> Condition:
            return known[words] if embeds is None else handed[id(embeds)]

        each = [
            (
                condition_of(one.prompt_embeds, self._prompt_of(one)),
                None
                if one.settings.guidance_scale == 1
                else condition_of(one.negative_prompt_embeds, self._null_of(one)),
            )
            for one in candidates
        ]
        return each if self.ip_adapter is None else shown(self.ip_adapter, candidates, each)

    def _prompt_of(self, candidate: Candidate) -> PromptSpec:
        settings, text = candidate.settings, candidate.prompt
        pieces = self._pieces(text, candidate)
        return PromptSpec(settings.plain(text), settings.clip_skip, self.time_ids(settings), pieces, settings.prompt_2)

    def _null_of(self, candidate: Candidate) -> PromptSpec:
        """What it is guided away from; as in diffusers, no layer is skipped here."""
        settings = candidate.settings
        null, second = settings.negative_prompt, settings.negative_prompt_2
        pieces = self._pieces(null, candidate)
        return PromptSpec(settings.plain(null), None, self.time_ids(settings, of_null=True), pieces, second)

    def _pieces(self, text: str, candidate: Candidate) -> tuple[TextPiece, ...]:
        """As what a candidate's text is read: prompt and null as equally many pieces; none where it is read whole."""
        settings = candidate.settings
        parts = self._parts(text, settings)
        number = 1
        if settings.long_prompts:
            others = (candidate.prompt, settings.negative_prompt)
            number = max(self.text.num_pieces(self._parts(other, settings)) for other in others)
        if number == 1 and all(weight == 1 for _, weight in parts):
            return ()
        return tuple(TextPiece(parts, k) for k in range(number))

    def _parts(self, text: str, settings: Settings) -> tuple[tuple[str, float], ...]:
        if not settings.prompt_weights:
            return ((text, 1.0),)
        return tuple((part.text, part.weight) for part in parse("prompt", text))

    def _read_for(self, candidate: Candidate) -> Iterator[PromptSpec]:
        """What the text tower has to read for this candidate."""
        if candidate.prompt_embeds is None:
            yield self._prompt_of(candidate)
        if candidate.negative_prompt_embeds is None and candidate.settings.guidance_scale != 1:
            yield self._null_of(candidate)

    def _encoded(self, words: Sequence[PromptSpec]) -> list[Condition]:
        """The conditions of these words; those of one `clip_skip` are read together, and each in pieces by itself."""
        asked = dict.fromkeys(each._replace(time_ids=()) for each in words if not each.pieces)
        found = {EMPTY: self._empty} if EMPTY in asked else {}
        for clip_skip in dict.fromkeys(each.clip_skip for each in asked):
            new = [each for each in asked if each.clip_skip == clip_skip and each not in found]
            found |= zip(new, in_turns(new, partial(self._read_whole, clip_skip)), strict=True)
        conditions = [
            self._in_pieces(each.pieces, each.clip_skip) if each.pieces else found[each._replace(time_ids=())].copy()
            for each in words
        ]
        return [
            self._with_time_ids(condition, each.time_ids) for condition, each in zip(conditions, words, strict=True)
        ]

    def _read_whole(self, clip_skip: int | None, words: Sequence[PromptSpec]) -> list[Condition]:
        second = [each.text if each.text_2 is None else each.text_2 for each in words]
        return self.read([each.text for each in words], clip_skip, second)

    def _in_pieces(self, pieces: Sequence[TextPiece], clip_skip: int | None) -> Condition:
        """A text read piece by piece: the states one behind the other, moved from the empty prompt's by their weights.

        What is told of it pooled is told of its first piece.
        """
        if (needed := self.text.num_pieces(pieces[0].parts)) > len(pieces):
            text = "".join(part for part, _ in pieces[0].parts)
            logger.warning("a text of %d pieces is cut to %d: %s", needed, len(pieces), quoted(text))
        return self.joined(pieces, in_turns(pieces, lambda some: self.read(some, clip_skip)))

    def apply_prompt_weights(
        self, pieces: Sequence[TextPiece], states: Sequence[Tensor | None], empty: Tensor | None
    ) -> Tensor:
        """The states (L, D) of each piece moved from the empty prompt's by their weights, and one behind the other."""
        moved = []
        for piece, each in zip(pieces, states, strict=True):
            assert each is not None and empty is not None, "these families read tokens"
            weights = to_device(piece.weights(self.text.tokenizer, len(empty)), empty.device)[:, None]  # (L, 1)
            difference = each.float() - empty.float()
            moved.append(torch.where(weights == 1, each.float(), empty.float() + weights * difference))
        return torch.cat(moved)

    def _with_time_ids(self, condition: Condition, time_ids: tuple[float, ...]) -> Condition:
        if not time_ids:
            return condition
        ids = torch.tensor(time_ids, dtype=weights_dtype(self.unet))
        return replace(condition, time_ids=to_device(ids, self.device))

    @cached_property
    @torch.no_grad()
    def _empty(self) -> Condition:
        """The empty prompt, which most pictures are guided away from; encoded once."""
        return self.read([""], None)[0]

    def call_unet(self, network: UNet2DConditionModel, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """What a UNet says of (M, C, h, w) noisy latents."""
        read: dict[str, Any] | None = reading(network, conditions.distinct_encoder_hidden_states, torch.stack)
        if self.ip_adapter is not None and network is self.unet:
            pictures = conditions.distinct_ip_hidden_states(self.ip_adapter.blank)
            if any(picture is not self.ip_adapter.blank for picture in pictures.unique):
                seen = seeing(network, pictures, partial(self.ip_adapter.pairs, network))
                read = {**(read or {}), **seen}
        if read is not None and not is_stood_in(network) and conditions.alike is not None:
            read = {**read, "alike": conditions.alike}
        return network(
            conditions.beside(x).to(weights_dtype(network)),
            timestep,
            encoder_hidden_states=conditions.encoder_hidden_states,
            cross_attention_kwargs=read,
            return_dict=False,
            **self.unet_kwargs(conditions),
        )[0]


def shown(adapter: IPAdapter, candidates: Sequence[Candidate], pairs: Sequence[ConditionPair]) -> list[ConditionPair]:
    """What candidates are told, those that come with a picture with its tokens beside their words.

    A null is shown what the adapter has for it.
    """
    embeds = [one.ip_adapter_image_embeds for one in candidates]
    given = {id(each): each for each in embeds if each is not None}
    tokens = dict(zip(given, adapter.tokens(list(given.values())), strict=True)) if given else {}
    with_it: dict[tuple[int, int], Condition] = {}  # one for all candidates of a prompt

    def beside(condition: Condition, picture: Tensor) -> Condition:
        key = (id(condition), id(picture))
        if key not in with_it:
            with_it[key] = replace(condition, ip_hidden_states=picture)
        return with_it[key]

    return [
        (prompt, null)
        if embed is None
        else (beside(prompt, tokens[id(embed)]), None if null is None else beside(null, adapter.null))
        for (prompt, null), embed in zip(pairs, embeds, strict=True)
    ]


def check_length(text: TextTower, where: str, name: str) -> None:
    """ValueError for a tokenizer that lets texts be longer than the text tower reads."""
    length, positions = text.shape[0], text.encoder.config.max_position_embeddings
    if length > positions:  # transformers says 10**30 where no file says how long a text may be
        raise ValueError(f"{where}: model_max_length of the tokenizer is {length}, {name} has {positions}")
