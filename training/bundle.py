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

from clip_core.text import with_projection, without_projection
from gen import checkpoint
from gen.adapters import drafts
from gen.card import Card, words_of
from gen.model_index import INDEX
from gen.part import load_part
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

    Raises RecipeError when two parts were not trained for each other, ValueError when one is missing.
    """
    clip, vae = load_clip(recipe.clip), load_vae(recipe.vae)
    network = transformers_model(clip)
    prior, decoder = trained(recipe.prior), trained(recipe.decoder)
    unet, prior_network = _part(UNet2DConditionModel, decoder), _part(PriorTransformer, prior)
    drafting = None if recipe.draft is None else trained(recipe.draft, drafts.TOLD)
    drafter = None if drafting is None else drafts.read(drafting, unet)  # refused, where it does not fit
    width = network.config.projection_dim
    for what, given, needed in (
        (f"{decoder}: text width", unet.config.cross_attention_dim, network.config.text_config.hidden_size),
        (f"{decoder}: class input", unet.config.projection_class_embeddings_input_dim, 2 * width),
        (f"{decoder}: latent channels", unet.config.in_channels, vae.config.latent_channels),
        (f"{prior}: embedding width", prior_network.config.embedding_dim, width),
        (f"{prior}: text length", prior_network.config.num_embeddings, clip.tokenizer.model_max_length),
    ):
        if given != needed:
            raise RecipeError(f"{what} is {given}, but {recipe.clip} and {recipe.vae} need {needed}; train it on them")
    parts = {
        "tokenizer": clip.tokenizer,
        "text_encoder": without_projection(network),
        "unet": unet,
        "scheduler": _part(DDIMScheduler, decoder / "scheduler"),
        "vae": vae,
        "image_normalizer": _part(StableUnCLIPImageNormalizer, decoder / "image_normalizer"),
        "image_noising_scheduler": _part(DDPMScheduler, decoder / "image_noising_scheduler"),
        "prior": prior_network,
        "prior_tokenizer": clip.tokenizer,
        "prior_text_encoder": with_projection(network),
        "prior_scheduler": _part(DDIMScheduler, prior / "scheduler"),
    }
    scores = json.loads(Path(recipe.scores).read_text()) if recipe.scores and Path(recipe.scores).exists() else {}
    card = Card(
        knows=recipe.knows,
        words=tuple(sorted(_words(Path(recipe.data)))),
        defaults=recipe.defaults,
        scores=scores,
        more={"training": recipe.training},
    )
    out = Path(recipe.out)
    if out.exists() and not (out / INDEX).exists():
        raise RecipeError(f"out {recipe.out!r} exists and is no model folder; it would be replaced, so choose another")

    def write(folder: Path) -> None:
        dtype = getattr(torch, recipe.dtype)
        checkpoint.save(folder, "StableUnCLIPPipeline", parts, clip, card, dtype)
        if drafting is not None and drafts.is_low_rank(drafting):
            shutil.copytree(drafting, folder / drafts.FOLDER)
        elif drafter is not None:
            drafts.save(drafter, folder / drafts.FOLDER, dtype)

    replace_folder(out, write)
    return out


def _part(kind: type, folder: Path) -> Any:
    """One part by its library's loader; safetensors alone, where the library would fall back to pickle."""
    return load_part(kind, folder, "cpu", torch.float32)


def _words(data: Path) -> set[str]:
    """Every word of the captions, as a card counts them."""
    return {word for example in find_examples(data, Skipped()) for word in words_of(example.text)}
