"""What a network for drafts is taught: one step of it ends where the model's own guided steps do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gen import TextToImage, command
from gen.adapters import drafts, lora
from gen.drafter import SAMPLER
from samplers.noise import noise
from tests.training.tiny_recipes import recipes, written
from training import trajectories
from training.draft_task import DraftRecipe, DraftTask
from training.recipe import RecipeError, check


def make(pictures: Path, trained: Path, **changes: Any) -> DraftTask:
    return DraftTask(check(DraftRecipe, recipes(pictures, trained)["draft"] | changes))


def batch_of(task: DraftTask, number: int) -> tuple[torch.Tensor, list[str]]:
    points, captions = zip(*(task.dataset[index] for index in range(number)), strict=True)
    return torch.stack(points), list(captions)


def test_trajectories_are_those_of_the_engine(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    """From the seed's noise to its picture, each caption several times, with other seeds."""
    task = make(few_shapes, trained, guidance_scale=3.0, num_images_per_prompt=2, out=str(tmp_path))
    painter = TextToImage.from_pretrained(trained / "bundled", device="cpu")
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": SAMPLER, "prior": False}
    for index in (0, 1, 5):
        points, caption = task.dataset[index]
        assert len(points) == 3, "two steps of a draft"
        start = noise([index], "decoder", 0, (4, 8, 8))[0] * painter.model.levels.schedule(SAMPLER, 4).start_scale
        torch.testing.assert_close(points[0], start)
        painted = painter(caption, **asked, seed=index, rerank=False, output_type="latent").images
        torch.testing.assert_close(points[-1], painted[0], atol=1e-4, rtol=1e-4)
    assert task.dataset.captions[0] == task.dataset.captions[1] != task.dataset.captions[2]


def test_trajectories_are_painted_once(
    few_shapes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "TOGETHER", 4)
    data = Path(shutil.copytree(few_shapes, tmp_path / "data", ignore=shutil.ignore_patterns(".cache")))
    first = make(data, trained)
    calls: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(len(given[1]))
        return paint(*given)

    paint = trajectories.painted
    monkeypatch.setattr(trajectories, "painted", counted)
    again = make(data, trained)
    assert not calls and torch.equal(again.dataset.points, first.dataset.points) and again.reads == first.reads
    (gone, *_) = sorted((data / ".cache" / "trajectories").iterdir())
    gone.unlink()  # as if it had been interrupted there
    assert torch.equal(make(data, trained).dataset.points, first.dataset.points)
    assert calls == [4]
    make(data, trained, guidance_scale=4.0)
    assert sum(calls) == 4 + len(first.dataset), "guided in another way, they go elsewhere"


def test_a_student_that_takes_the_same_steps_has_no_error(few_shapes: Path, trained: Path) -> None:
    """Where a draft has as many steps as the model and nothing guides, the model's own weights are the answer."""
    task = make(few_shapes, trained, num_inference_steps=4, guidance_scale=1.0)
    assert task(batch_of(task, 8), torch.Generator().manual_seed(0))["loss"].item() < 1e-8
    guided = make(few_shapes, trained, num_inference_steps=4, guidance_scale=3.0)
    assert guided(batch_of(guided, 8), torch.Generator().manual_seed(0))["loss"].item() > 1e-6


def test_what_is_saved_says_what_it_follows(trained: Path) -> None:
    drafter = drafts.read(trained / "draft" / "model", TextToImage.from_pretrained(trained / "bundled").model.unet)
    assert (drafter.num_inference_steps, drafter.guidance_scale) == (2, 2.0)  # the model's default


def test_a_lora_is_trained_from_a_whole_network(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    """Which it is as far as it can say it, and it is measured as it is saved."""
    whole = drafts.read(trained / "draft" / "model", TextToImage.from_pretrained(trained / "bundled").model.unet).unet
    errors = {}
    for rank in (None, 1000, 1):
        task = make(few_shapes, trained, rank=rank)
        task.start_from(trained / "draft" / "model")
        errors[rank] = task.measure(task.network)["held_back_error"]
    assert errors[1000] == pytest.approx(errors[None], rel=0.1), "but for norms and biases"
    assert errors[1] != errors[1000]
    recipe = recipes(few_shapes, trained)["draft"] | {"rank": 1, "init": str(trained / "draft" / "model")}
    recipe["out"] = str(tmp_path / "low")
    assert command.main(["train", "draft", "--recipe", str(written(recipe, tmp_path))]) == 0
    saved = tmp_path / "low" / "model"
    assert sorted(path.name for path in saved.iterdir()) == ["draft.json", lora.USUAL]
    model = TextToImage.from_pretrained(trained / "bundled", draft_unet=saved).model
    assert model.drafter is not None
    name = "conv_in.weight"
    difference = (model.drafter.unet.state_dict()[name] - model.unet.state_dict()[name]).flatten(1)
    assert torch.linalg.matrix_rank(difference, tol=1e-3 * difference.norm().item()) == 1
    assert not torch.equal(model.drafter.unet.state_dict()[name], whole.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_steps": 5}, "the 2 levels of a draft are not among the 5 of the model"),
        ({"model": "nowhere"}, "nowhere"),
        ({"data": "nowhere"}, "nowhere holds no data"),
    ],
)
def test_what_cannot_be_taught_is_refused(
    few_shapes: Path, trained: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        make(few_shapes, trained, **changes)
