"""What was asked, checked: every mistake a user can make is found here, before any network runs.

`resolve` checks a `Request`'s words against what a model can do (`Abilities`) and fills in what was left out, giving a
`Job`: prompts, one seed per candidate, and `Settings`, which with the model, the prompt and the seed are all that a
picture depends on. It knows no network and no file.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from gen.candidate import MAX_SEED, PICTURES, SHOWN, SHOWN_PICTURE, TENSORS, Candidate
from gen.checks import as_number, boolean, count_of, integer, is_number, one_of, refusal, texts
from gen.request import Job, Request
from gen.request_checks import (
    POOLED,
    Pictures,
    check_beginning,
    check_conditions,
    check_pictures,
    check_reading,
    check_tensors,
    check_variation,
    ignored,
)
from gen.search import BestOf, Search, by_name
from gen.settings import SAMPLER_OPTIONS, SECOND, Abilities, Settings
from gen.settings_checks import check_settings
from gen.source import RGB, check_alike, num_of, size_of, sources

NUMBERS = ("int | None", "float | None")  # what the words of a call that are numbers are annotated with
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
MOST_CANDIDATES = 1_000_000  # of a request: all are listed before one is painted, 0.3 GB of them
MOST_IN_BUDGET = 4096  # candidates of a prompt, where only a budget says how many


def resolve(request: Request, abilities: Abilities) -> Job:
    """Check every word against what the model can do and fill in what was left out.

    Raises ValueError with one line: what was given, what is allowed, what to do. Warns of what is not read.
    """
    request = with_numbers(request)
    prompts = prompts_of(request)
    n, keep, rank = counts(request, abilities, len(prompts))
    search = search_of(request, rank, chooses=keep < n)
    one_of("output_type", request.output_type, OUTPUT_TYPES)

    latents = image_latents(request, abilities, len(prompts), n)
    pictures = pictures_of(request, len(prompts), latents)
    check_beginning(request, abilities)
    shared = filled_in(request, abilities, pictures, latents)
    check_settings(shared, abilities)
    check_conditions(request, shared, abilities)
    unread = ignored(request, shared, abilities)
    for name, reason in unread:
        warnings.warn(f"{name} is ignored: {reason}", UserWarning, stacklevel=2)
    check_pictures(request, shared, abilities, pictures)
    check_variation(request)
    settings = settings_of_each(request, prompts, shared)
    seeds = candidate_seeds(request.seed, len(prompts), n)
    check_tensors(request, shared, abilities, len(prompts), n)
    check_settings(settings[0], abilities)  # with the texts that prompts have of their own

    tensors = tensors_of(request, {name for name, _ in unread}, latents)
    return Job(
        candidates=candidates(prompts, settings, seeds, pictures, tensors),
        num_images_per_prompt=n,
        keep=keep,
        rank=rank,
        output_type=request.output_type,
        search=search,
        budget=request.budget,
        diverse=request.diverse,
    )


def with_numbers(request: Request) -> Request:
    """The same with numbers as Python's own; ValueError for several in the place of one."""
    numbers = {item.name: as_number(getattr(request, item.name)) for item in fields(request) if item.type in NUMBERS}
    for name, value in numbers.items():
        if isinstance(value, Tensor | np.ndarray):
            raise refusal(name, value, "a number")
    return replace(request, **numbers)


def prompts_of(request: Request) -> tuple[str, ...]:
    """One text for each prompt, empty where something else stands in its place."""
    if request.prompt is None:
        return ("",) * num_textless(request)
    prompts = texts("prompt", request.prompt)
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one text")
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"prompt is empty ({prompt!r}); say in words what to paint")
    return prompts


def num_textless(request: Request) -> int:
    """How many prompts there are, by what stands in their place."""
    source = request.prompt_embeds if request.prompt_embeds is not None else request.image_embeds
    if source is None and request.variation_of is not None:
        if not (number := num_of(request.variation_of)):
            raise ValueError("variation_of is empty; give at least one picture")
        return number
    if source is None:
        advice = "give a text, a list of texts, prompt_embeds, image_embeds or variation_of"
        raise ValueError(f"prompt is missing; {advice}")
    if not isinstance(source, Tensor) or source.ndim < 2 or not len(source):
        raise ValueError("without a prompt, prompt_embeds or image_embeds must be a tensor of one or more")
    return len(source)


def counts(request: Request, abilities: Abilities, prompts: int) -> tuple[int, int, bool]:
    """How many candidates of each prompt are painted, how many of them are kept, and whether they are ranked."""
    n = num_candidates(request, prompts)
    keep = n if request.keep is None else integer("keep", request.keep, 1)
    if keep > n:
        raise ValueError(f"keep={keep} is more than num_images_per_prompt={n}; keep at most what is painted")
    rank = is_ranked(request, abilities)
    if keep < n and not rank:
        why, cure = "rerank=False", "let it rank"
        if not request.is_whole:
            why, cure = f"denoising_end={request.denoising_end} leaves no whole picture", "leave that out"
        if not abilities.can_rank:
            why, cure = "this model has no clip/ to rank with", "load it with clip=NAME"
        raise ValueError(f"keep={keep} of {n} needs a ranking, but {why}; leave keep out, or {cure}")
    return n, keep, rank


def num_candidates(request: Request, prompts: int) -> int:
    """Those of each prompt, or the most of them that a budget may be spent on."""
    most = MOST_CANDIDATES // prompts
    if not most:
        raise ValueError(f"{prompts} prompts are more than one request takes; give at most {MOST_CANDIDATES}")
    if request.budget is not None and (not is_number(request.budget, 0.0) or request.budget == 0):
        raise refusal("budget", request.budget, "a number of seconds above 0")
    if request.num_images_per_prompt is None:
        return 1 if request.budget is None else min(most, MOST_IN_BUDGET)
    n = integer("num_images_per_prompt", request.num_images_per_prompt, 1)
    if n > most:
        of = "" if prompts == 1 else f" of {prompts} prompts"
        raise ValueError(f"num_images_per_prompt={n}{of} is more than one request takes; give at most {most}")
    return n


def is_ranked(request: Request, abilities: Abilities) -> bool:
    """Whether a CLIP says which candidates are the best; ValueError where it is to and cannot."""
    if request.rerank is None:
        return abilities.can_rank and request.prompt is not None and request.is_whole
    boolean("rerank", request.rerank)
    if request.rerank and not request.is_whole:
        raise ValueError(f"rerank=True needs whole pictures, and denoising_end={request.denoising_end} leaves none")
    if request.rerank and not abilities.can_rank:
        advice = "load it with clip=NAME (a CLIP folder, hub id or open_clip:NAME/TAG), or leave rerank out"
        raise ValueError(f"rerank=True, but this model has no clip/ to rank with; {advice}")
    if request.rerank and request.prompt is None:
        raise ValueError("rerank=True needs the prompt as text; give prompt as well, or leave rerank out")
    return request.rerank


def search_of(request: Request, rank: bool, *, chooses: bool) -> Search:
    """Which candidates are painted to their end; `chooses`: fewer are kept than are painted."""
    search = by_name("best_of" if request.search is None else request.search)
    if request.denoising_start and not isinstance(search, BestOf):
        raise ValueError(f"search '{search.name}' begins with noise, and denoising_start does not; leave one out")
    if not rank and not isinstance(search, BestOf):
        raise ValueError(f"search '{search.name}' goes by CLIP's scores, but nothing is ranked; let it rank")
    if boolean("diverse", request.diverse) and not chooses:
        raise ValueError("diverse=True chooses among candidates, but all are kept; give a smaller keep")
    return search


def image_latents(request: Request, abilities: Abilities, num_prompts: int, n: int) -> list[Tensor] | None:
    """What `image` says as latents, for each candidate one; None: it is a picture, or missing."""
    image, channels = request.image, abilities.latent_channels
    is_latents = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels != RGB
    if not is_latents:
        if request.denoising_start:
            problem = "denoising_start goes on from latents; give image=latents of a request with denoising_end"
            raise ValueError(f"{problem} and output_type='latent'")
        return None
    assert isinstance(image, Tensor)
    each = image.detach().cpu().float().clone().unbind(0)
    for name in ("mask_image", "latents"):
        if getattr(request, name) is not None:
            raise ValueError(f"{name} and image as latents were both given; leave {name} out")
    repeats = {1: num_prompts * n, num_prompts: n, num_prompts * n: 1}
    if len(each) not in repeats:
        problem = f"image has {len(each)} latents for {count_of(num_prompts, 'prompt')} of {count_of(n, 'picture')}"
        raise ValueError(f"{problem}; give one, one for each prompt, or one for each picture")
    return [one for one in each for _ in range(repeats[len(each)])]


def pictures_of(request: Request, num_prompts: int, latents: Sequence[Tensor] | None) -> Pictures:
    """The pictures handed in, read; `image` is none where it was given as latents."""
    handed = {name: getattr(request, name) for name in PICTURES} | ({"image": None} if latents else {})
    return {name: sources(name, handed[name], num_prompts, channels) for name, channels in PICTURES.items()}


def filled_in(request: Request, abilities: Abilities, pictures: Pictures, latents: Sequence[Tensor] | None) -> Settings:
    """What all prompts are painted with: as asked for, else as the picture has it, else the model's own."""
    names = {item.name for item in fields(Settings)} - {"negative_prompt", *SECOND}
    given: dict[str, Any] = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.sampler not in (None, abilities.defaults.sampler):
        given = dict.fromkeys(SAMPLER_OPTIONS) | given  # the model's own are its own sampler's
    if request.has_embedding:
        given["prior"] = False
    begun = abilities.strength if request.mask_image is None else abilities.mask_strength
    given.setdefault("strength", 1.0 if request.image is None else begun)
    if request.denoising_start:  # which says where it begins
        given["strength"] = 1.0
    if (first := pictures["image"][0]) is not None:
        check_alike(pictures["image"], request.height, request.width)
        given["height"], given["width"] = size_of(first, request.height, request.width, abilities.size_multiple)
    if latents:
        given["height"], given["width"] = size_of_latents(
            latents[0], abilities.cell_size, request.height, request.width
        )
    return abilities.defaults.updated(given, "request")


def size_of_latents(latents: Tensor, cell: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels of latents (C, h, w); ValueError where others were asked for."""
    own = latents.shape[-2] * cell, latents.shape[-1] * cell
    for name, asked, pixels in zip(("height", "width"), (height, width), own, strict=True):
        if asked not in (None, pixels):
            raise ValueError(f"{name}={asked}, and image's latents are of {pixels}; leave it out")
    return own


def settings_of_each(request: Request, prompts: Sequence[str], shared: Settings) -> list[Settings]:
    """The settings of each prompt: those that all share, with texts beside the prompt."""
    negatives = negatives_of(request, len(prompts))
    check_reading(request, shared, [*prompts, *negatives, shared.interpolate_prompt])
    second = [each_of(name, getattr(request, name), len(prompts)) for name in SECOND]
    return [
        replace(shared, negative_prompt=negative, prompt_2=prompt, negative_prompt_2=null)
        for negative, prompt, null in zip(negatives, *second, strict=True)
    ]


def negatives_of(request: Request, num_prompts: int) -> tuple[str, ...]:
    """The negative prompt of each, empty where none was given."""
    if request.negative_prompt is None:
        return ("",) * num_prompts
    if request.negative_prompt_embeds is not None:
        raise ValueError("negative_prompt and negative_prompt_embeds were both given; give one of them")
    return tuple(text or "" for text in each_of("negative_prompt", request.negative_prompt, num_prompts))


def each_of(name: str, value: str | Sequence[str] | None, num_prompts: int) -> tuple[str | None, ...]:
    """A text for each prompt, of one for all or of as many; None for each where none was given."""
    if value is None:
        return (None,) * num_prompts
    given = texts(name, value)
    if isinstance(value, str):
        given *= num_prompts
    if len(given) != num_prompts:
        problem = f"{name} has {count_of(len(given), 'text')} for {count_of(num_prompts, 'prompt')}"
        raise ValueError(f"{problem}; give one or as many")
    return given


def candidate_seeds(seed: int | Sequence[int] | None, num_prompts: int, n: int) -> tuple[int, ...]:
    """Seeds of all candidates, prompt by prompt: candidate k of a prompt with seed s has seed s + k."""
    last = MAX_SEED - (n - 1)
    if seed is None:
        starts = [secrets.randbelow(last + 1)] * num_prompts
    elif isinstance(seed, str) or not isinstance(seed, Sequence):
        starts = [integer("seed", seed, 0, last)] * num_prompts
    else:
        starts = [integer("seed", value, 0, last) for value in seed]
        if len(starts) != num_prompts:
            problem = f"seed has {count_of(len(starts), 'number')} for {count_of(num_prompts, 'prompt')}"
            raise ValueError(f"{problem}; give one, or one for each")
    return tuple(start + k for start in starts for k in range(n))


def tensors_of(
    request: Request, unread: Collection[str], latents: Sequence[Tensor] | None
) -> dict[str, dict[int, Tensor]]:
    """The entries of each tensor, taken apart once, so that the candidates of a prompt share them; of `unread` none."""
    unread = {*unread, *(POOLED[name] for name in POOLED if name in unread)}
    tensors = {name: entries(None if name in unread else getattr(request, name)) for name in (*TENSORS, SHOWN)}
    return tensors | {"image_latents": dict(enumerate(latents or ()))}


def entries(tensor: Tensor | None) -> dict[int, Tensor]:
    """The entries of a tensor along its first axis, by their index; none of one that was not given.

    Copied, for a request in flight must not see what becomes of the caller's memory.
    """
    return {} if tensor is None else dict(enumerate(tensor.detach().clone().unbind(0)))


def candidates(
    prompts: Sequence[str],
    settings: Sequence[Settings],  # of each prompt
    seeds: Sequence[int],  # of each candidate, prompt by prompt
    pictures: Pictures,
    tensors: Mapping[str, Mapping[int, Tensor]],
) -> tuple[Candidate, ...]:
    """One of each seed, with what is its prompt's and what is its own."""
    n = len(seeds) // len(prompts)
    return tuple(
        Candidate(
            prompt=prompts[at],
            seed=seeds[index],
            settings=settings[at],
            latents=tensors["latents"].get(index),
            prior_latents=tensors["prior_latents"].get(index),
            super_res_latents=tensors["super_res_latents"].get(index),
            prompt_embeds=tensors["prompt_embeds"].get(at),
            negative_prompt_embeds=tensors["negative_prompt_embeds"].get(at),
            pooled_prompt_embeds=tensors["pooled_prompt_embeds"].get(at),
            negative_pooled_prompt_embeds=tensors["negative_pooled_prompt_embeds"].get(at),
            image_embeds=tensors["image_embeds"].get(at),
            image=pictures["image"][at],
            image_latents=tensors["image_latents"].get(index),
            mask_image=pictures["mask_image"][at],
            variation_of=pictures["variation_of"][at],
            interpolate_image=pictures["interpolate_image"][at],
            ip_adapter_image=pictures[SHOWN_PICTURE][at],
            ip_adapter_image_embeds=tensors[SHOWN].get(at),
            negative_image_embeds=tensors["negative_image_embeds"].get(at),
        )
        for at in range(len(prompts))
        for index in range(at * n, (at + 1) * n)
    )
