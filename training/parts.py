"""The trainable parts by name: the recipe each reads and the task it makes."""

from __future__ import annotations

from typing import Any

from training.clip_task import ClipRecipe, ClipTask
from training.decoder_task import DecoderRecipe, DecoderTask
from training.draft_task import DraftRecipe, DraftTask
from training.prior_task import PriorRecipe, PriorTask
from training.recipe import Recipe
from training.vae_task import VaeRecipe, VaeTask

# Any in the second place: each task takes the recipe class beside it
PART_TASKS: dict[str, tuple[type[Recipe], Any]] = {
    "clip": (ClipRecipe, ClipTask),
    "vae": (VaeRecipe, VaeTask),
    "prior": (PriorRecipe, PriorTask),
    "decoder": (DecoderRecipe, DecoderTask),
    "draft": (DraftRecipe, DraftTask),
}
