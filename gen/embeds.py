"""Image embeddings that a user asks for: a picture's, one between two, one moved as a caption differs from another.

Ramesh et al. 2022 (DALL-E 2), section 3. Here too is what a prior is asked for a candidate, more than once where the
best of its answers is wanted or one between two prompts', and what becomes of the answers. It knows embeddings; what a
decoder is told of one is its family's, and no row is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_core.clip import CLIP
from clip_core.score import cosine
from gen.candidate import Candidate
from gen.conditioning import Condition, ConditionPair, Table
from gen.model import Family
from gen.source import Source

PRIOR_SEED_STRIDE = 0x27D4EB2F  # a prime of xxHash: how far apart the seeds of a prior's answers to one text are
STRAIGHT = 1e-4  # the sine of an angle below which there is no arc to go along


@runtime_checkable
class WithImageTower(Protocol):
    """A family that can make the embeddings it takes."""

    @property
    def clip(self) -> CLIP | None:
        """The CLIP whose both towers they are of; None: there is none."""

    def embed_image(self, pixels: Tensor) -> Tensor:
        """The embedding (E,) float32 of pixels (3, H, W) in [0, 1]."""


@runtime_checkable
class WithPictures(Protocol):
    """A family that may be shown a picture beside the text, by an IP-Adapter."""

    def see_beside(self, pixels: Tensor) -> Tensor:
        """What is shown of pixels (3, H, W) in [0, 1]: (E,) or (S, E) float32."""


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """From one vector (..., E) to another along the sphere by a share of their angle; lengths go evenly."""
    lengths = torch.lerp(start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True), share)
    first, last = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    angle = (first * last).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / sine.clamp(min=STRAIGHT)
    return torch.where(sine < STRAIGHT, torch.lerp(start, end, share), arc * lengths)


def moved(image: Tensor, before: Tensor, after: Tensor, share: float) -> Tensor:
    """An image embedding (E,) turned by a share of the angle to where one text embedding differs from another (E,).

    Text differences: Ramesh et al. 2022, section 3.3, who take shares of 0.25 to 0.5; the length is kept.
    """
    direction = F.normalize(after, dim=-1) - F.normalize(before, dim=-1)
    return slerp(image, F.normalize(direction, dim=-1) * image.norm(dim=-1, keepdim=True), share)


def between(start: Condition, end: Condition, share: float) -> Condition:
    """What a network is told between two texts: token by token, and so the pooled text."""

    def mixed(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else slerp(one.float(), other.float(), share).to(one.dtype)

    return replace(
        start,
        encoder_hidden_states=mixed(start.encoder_hidden_states, end.encoder_hidden_states),
        pooled_projections=mixed(start.pooled_projections, end.pooled_projections),
    )


def with_embeds(model: object, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with the embeddings of the pictures they ask for: in place of a prior's answer, or beside the text."""
    made: dict[tuple[object, ...], Tensor] = {}
    beside: dict[int, Tensor] = {}  # by the picture's identity
    found = []
    for one in candidates:
        if one.variation_of is not None:
            one = replace(one, image_embeds=_embed(model, one, one.variation_of, made))
        if (picture := one.ip_adapter_image) is not None:
            if id(picture) not in beside:
                assert isinstance(model, WithPictures), "refused of a model that is shown nothing"
                beside[id(picture)] = model.see_beside(picture.sized(*picture.size))
            one = replace(one, ip_adapter_image_embeds=beside[id(picture)])
        found.append(one)
    return found


def _embed(model: object, candidate: Candidate, picture: Source, made: dict[tuple[object, ...], Tensor]) -> Tensor:
    """One candidate's; `made` has those of others, which are told apart by all that they depend on."""
    assert isinstance(model, WithImageTower), "refused of a model that sees nothing"
    settings, other = candidate.settings, candidate.interpolate_image
    key = (id(picture), id(other), candidate.prompt, settings.edit_from, settings.interpolation, settings.edit_amount)
    if key not in made:
        embed = model.embed_image(picture.sized(*picture.size))
        if other is not None:
            embed = slerp(embed, model.embed_image(other.sized(*other.size)), settings.interpolation)
        if settings.edit_from:
            assert model.clip is not None, "refused without both towers"
            before, after = model.clip.text([settings.edit_from, settings.plain(candidate.prompt)]).embedding.float()
            embed = moved(embed, before, after, settings.edit_amount)
        made[key] = embed
    return made[key]


def with_other_prompts(
    model: Family, candidates: Sequence[Candidate], pairs: Sequence[ConditionPair], others: Sequence[ConditionPair]
) -> list[ConditionPair]:
    """What candidates are told between their prompt and another; `others` is what they are told of that one."""
    made: dict[tuple[int, int, float], Condition] = {}
    found = []
    for candidate, (prompt, null), (other, _) in zip(candidates, pairs, others, strict=True):
        if candidate.settings.interpolate_prompt:
            key = (id(prompt), id(other), candidate.settings.interpolation)
            if key not in made:
                made[key] = model.between(prompt, other, candidate.settings.interpolation)
            prompt = made[key]
        found.append((prompt, null))
    return found


def encode_prompts(model: Family, candidates: Sequence[Candidate], table: Table) -> list[ConditionPair]:
    """What each candidate is told before any prior has spoken, also where that is between two prompts."""
    pairs = model.encode_prompts(candidates, table)
    goals = [one.settings.interpolate_prompt for one in candidates]
    if not any(goals):
        return pairs
    others = [replace(one, prompt=goal) if goal else one for one, goal in zip(candidates, goals, strict=True)]
    return with_other_prompts(model, candidates, pairs, model.encode_prompts(others, table))


def prior_samples(candidate: Candidate) -> list[Candidate]:
    """What a prior is asked for a candidate: every text of it, as often as the best answer is chosen of."""
    texts = [candidate.prompt]
    if candidate.settings.interpolate_prompt:
        texts.append(candidate.settings.interpolate_prompt)
    seeds = [(candidate.first_seed + k * PRIOR_SEED_STRIDE) % 2**32 for k in range(candidate.settings.prior_best_of)]
    return [replace(candidate, prompt=text, seed=seed, noise_path=()) for text in texts for seed in seeds]


def decided(candidate: Candidate, answers: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
    """The embedding (E,) made of a prior's answers (E,) to `prior_samples`, each to a text of this embedding (E,).

    Of several answers to one text that with the highest cosine (Ramesh et al. 2022, section 2.2: the better of two).
    """
    number = candidate.settings.prior_best_of
    best = []
    for first in range(0, len(answers), number):
        if number == 1:
            best.append(answers[first])
            continue
        group = torch.stack(list(answers[first : first + number]))
        scores = cosine(group, torch.stack(list(texts[first : first + number])).to(group.device))
        best.append(group.index_select(0, scores.argmax()[None])[0])  # an index that nobody waits for
    return best[0] if len(best) == 1 else slerp(best[0], best[1], candidate.settings.interpolation)
