"""What a network for drafts is taught: one step of it ends where the model's own guided steps do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gen import TextToImage
from gen.drafter import SAMPLER, Drafter
from samplers.noise import noise
from tests.training.tiny_recipes import recipes
from training.draft_task import DraftRecipe, DraftTask
from training.recipe import RecipeError, check


def make(data: Path, trained: Path, **changes: Any) -> DraftTask:
    return DraftTask(check(DraftRecipe, recipes(data, trained)["draft"] | changes))


@torch.no_grad()
def test_its_own_steps_are_those_of_the_engine(few_shapes: Path, trained: Path) -> None:
    """Guided step after step from noise to the end, beside the same picture painted by the engine."""
    task = make(few_shapes, trained, guidance_scale=3.0)
    caption = task.dataset.captions[0]
    prompts, nulls = task._told([caption])
    x = noise([7], "decoder", 0, (4, 8, 8)) * task.painter.levels.schedule(SAMPLER, 4).start_scale
    x = task._taken(x, torch.tensor([0]), 4, prompts, nulls)
    painter = TextToImage.from_pretrained(trained / "bundled", device="cpu")
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": SAMPLER, "prior": False}
    painted = painter(caption, **asked, seed=7, rerank=False, output_type="latent").images
    torch.testing.assert_close(x, painted, atol=1e-4, rtol=1e-4)


def test_a_student_that_takes_the_same_steps_has_no_error(few_shapes: Path, trained: Path) -> None:
    """Where a draft has as many steps as the model and nothing guides, the model's own weights are the answer."""
    task = make(few_shapes, trained, num_inference_steps=4, guidance_scale=1.0)
    latents, captions = zip(*(task.dataset[index] for index in range(8)), strict=True)
    loss = task((torch.stack(latents), list(captions)), torch.Generator().manual_seed(0))["loss"]
    assert loss.item() < 1e-8
    guided = make(few_shapes, trained, num_inference_steps=4, guidance_scale=3.0)
    assert guided((torch.stack(latents), list(captions)), torch.Generator().manual_seed(0))["loss"].item() > 1e-6


def test_what_is_saved_says_what_it_follows(trained: Path) -> None:
    drafter = Drafter.read(trained / "draft" / "model", torch.device("cpu"), torch.float32)
    assert (drafter.num_inference_steps, drafter.guidance_scale) == (2, 2.0)  # the model's default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_steps": 5}, "the 2 levels of a draft are not among the 5 of the model"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_taught_is_refused(
    few_shapes: Path, trained: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        make(few_shapes, trained, **changes)
