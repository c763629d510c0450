"""Put trained parts together as one model: a stock diffusers folder in the Stable unCLIP layout.

The CLIP's text tower is stored where stock pipelines look for it, the whole CLIP lies beside in `clip/`, and
`unclip.json` says what the model knows, how it was trained and what it reached. Trains nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, PriorTransformer, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from pydantic import Field

from clip_core.text import TextTower, with_projection, without_projection
from gen import checkpoint
from gen.adapters import drafts
from gen.card import Card, words_of
from gen.families.stable_unclip import StableUnCLIP
from gen.model_index import INDEX
from gen.part import load_part
from gen.prior import Prior
from gen.scheduler import NoiseLevels
from training.checkpoints import replace_folder
from training.data.examples import Skipped
from training.data.pictures import find_examples
from training.frozen import load_clip, load_vae, trained, transformers_model
from training.recipe import RecipeError, Section


class BundleRecipe(Section):
    """Keys of a recipe with `task: bundle`: the folders of trained parts, and what the model says of itself."""

    task: Literal["bundle"]
    out: str  # the model folder to write; one that is there is replaced
    data: str  # the image folder all was trained on: its words are what the model knows
    clip: str
    vae: str
    prior: str
    decoder: str
    draft: str | None = None  # a network for drafts of this decoder; None: there is none
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"  # of the weights on disk
    knows: str  # one sentence for people
    defaults: dict[str, Any] = Field(default_factory=dict)  # generation settings, by their names in gen's `Settings`
    training: dict[str, Any] = Field(default_factory=dict)  # hardware, time, sizes: whatever should be told
    scores: str | None = None  # a JSON file of measured scores, included when it is there


def bundle(recipe: BundleRecipe) -> Path:
    """Write the model folder, whole or not at all; return it.

    Raises RecipeError when two parts were not trained for each other or do not paint with `defaults`, ValueError when
    one is missing.
    """
    model, drafting = _model(recipe), None
    if recipe.draft is not None:
        drafting = trained(recipe.draft, drafts.DRAFT_CONFIG)
        model = model.with_drafter(drafts.read(drafting, model.unet), str(drafting))
    out = Path(recipe.out)
    if out.exists() and not (out / INDEX).exists():
        raise RecipeError(f"out {recipe.out!r} exists and is no model folder; it would be replaced, so choose another")

    def write(folder: Path) -> None:
        dtype = getattr(torch, recipe.dtype)
        checkpoint.save(folder, model.saved_as, model.parts(), model.clip_beside, model.card, dtype, model.index)
        if drafting is not None and drafts.is_low_rank(drafting):
            shutil.copytree(drafting, folder / drafts.FOLDER)
        elif model.drafter is not None:
            drafts.save(model.drafter, folder / drafts.FOLDER, dtype)

    replace_folder(out, write)
    return out


def _model(recipe: BundleRecipe) -> StableUnCLIP:
    """The parts as a model, which says whether they fit each other."""
    clip, vae = load_clip(recipe.clip), load_vae(recipe.vae)
    network = transformers_model(clip)
    prior, decoder = trained(recipe.prior), trained(recipe.decoder)
    model = StableUnCLIP(
        unet=_part(UNet2DConditionModel, decoder),
        vae=vae,
        text=TextTower(clip.tokenizer, without_projection(network)),
        levels=_levels(decoder / "scheduler"),
        image_normalizer=_part(StableUnCLIPImageNormalizer, decoder / "image_normalizer"),
        image_noising=_part(DDPMScheduler, decoder / "image_noising_scheduler"),
        prior=Prior(
            _part(PriorTransformer, prior), clip.tokenizer, with_projection(network), _levels(prior / "scheduler")
        ),
        clip=clip,
        card=_card(recipe),
    )
    try:
        model.check(recipe.out)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if not model.embeds_by_clip:  # which a family allows, whose image embeddings may come from elsewhere
        taken, made = model.embedding_width, network.config.projection_dim
        raise RecipeError(
            f"{decoder} takes image embeddings of width {taken}, but {recipe.clip} makes them of {made}; train it on it"
        )
    return model


def _card(recipe: BundleRecipe) -> Card:
    scores = json.loads(Path(recipe.scores).read_text()) if recipe.scores and Path(recipe.scores).exists() else {}
    return Card(
        knows=recipe.knows,
        words=tuple(sorted(_words(Path(recipe.data)))),
        defaults=recipe.defaults,
        scores=scores,
        more={"training": recipe.training},
    )


def _levels(folder: Path) -> NoiseLevels:
    return NoiseLevels.of(_part(DDIMScheduler, folder), str(folder))


def _part(kind: type, folder: Path) -> Any:
    """One part by its library's loader; safetensors alone, where the library would fall back to pickle."""
    return load_part(kind, folder, "cpu", torch.float32)


def _words(data: Path) -> set[str]:
    """Every word of the captions, as a card counts them."""
    return {word for example in find_examples(data, Skipped()) for word in words_of(example.text)}
