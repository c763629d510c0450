"""A recipe's kernel reaches networks of both libraries."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_recipes import recipes
from training.parts import PART_TASKS
from training.recipe import check


@pytest.mark.parametrize("part", ["clip", "prior", "decoder", "draft"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_network_computes_by_the_kernel_of_its_recipe(
    few_shapes: Path, trained: Path, part: str, kernel: str
) -> None:
    recipe_class, task_class = PART_TASKS[part]
    task: Any = task_class(check(recipe_class, recipes(few_shapes, trained)[part] | {"attention": kernel}))
    if part == "clip":
        assert task.network.clip.config._attn_implementation == kernel
        return
    unet = task.network.unet if part == "decoder" else task.network
    name = {"eager": "AttnProcessor", "sdpa": "AttnProcessor2_0"}[kernel]
    assert {type(each).__name__ for each in unet.attn_processors.values()} == {name}
    if part == "decoder":
        assert task.clip_model.config._attn_implementation == kernel
