"""Train a network for drafts: a UNet that says in few steps, unguided, what a model's own says in many, guided.

Progressive distillation (Salimans & Ho 2022, Algorithm 2) in one round, of a guided model (Meng et al. 2023), on the
model's own trajectories in place of noised pictures: from a level of the draft the model's UNet took several steps to
the draft's next level, and the student learns the clean estimate by which one step of DDIM ends at the same place. It
starts from the model's weights. Of the data only captions are read.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from gen.adapters import drafts, lora
from gen.attention.network import restore_attention
from gen.conditioning import Condition, Conditions, Table
from gen.drafter import SAMPLER, Drafter
from gen.families.autoencoder import KLModel
from gen.model_folder import find
from gen.pipeline import TextToImage
from gen.request import Request
from gen.resolve import resolve
from samplers.state import per_row
from training import low_rank
from training.attention import AttentionRecipe, use_attention
from training.data.cache import weights_digest
from training.data.examples import DataError, Skipped
from training.data.pictures import find_examples
from training.recipe import RecipeError
from training.sheets import captioned
from training.task import Task, validation_size
from training.trajectories import TrajectoryOptions, trajectories


class DraftRecipe(AttentionRecipe):
    """Keys of a recipe with `task: draft`."""

    task: Literal["draft"]
    model: str  # the model whose drafts it is to paint: a bundled name or a folder
    num_inference_steps: int = Field(5, gt=0)  # of a draft
    teacher_steps: int | None = Field(None, gt=0)  # of the model's own UNet, a multiple of these; None: its default
    guidance_scale: float | None = Field(None, ge=1)  # of that; None: its default
    num_captions: int = Field(5000, gt=0)  # of the data, the first; all where there are fewer
    num_images_per_prompt: int = Field(4, gt=0)  # trajectories of each caption
    rank: int | None = Field(None, gt=0)  # of a LoRA that is trained and saved, a small file; None: the whole UNet
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # in which the model paints them
    teacher_runtime: Literal["torch", "openvino"] = "torch"  # who computes them; openvino is faster on a CPU


READ_TOGETHER = 64  # captions that the text tower reads at once

Item = tuple[Tensor, str]
"""Points of a trajectory (P, C, h, w), one more than a draft's steps, and its caption."""


class Trajectories(Dataset[Item]):
    """The model's own ways to pictures, those of a caption behind one another."""

    def __init__(self, captions: list[str], points: Tensor) -> None:
        self.captions, self.points = captions, points

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Item:
        return self.points[index], self.captions[index]


class DraftTask(Task[UNet2DConditionModel]):
    """The squared error of the student's output at uniformly drawn levels of the draft."""

    def __init__(self, recipe: DraftRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        painter = TextToImage.from_pretrained(recipe.model, device="cpu")
        model, defaults = painter.model, painter.model.abilities.defaults
        if not isinstance(model, KLModel):
            raise RecipeError(f"model {recipe.model!r} has no KL autoencoder; drafts of such models are not taught yet")
        self.model = model
        self.steps = recipe.num_inference_steps
        self.scale = defaults.guidance_scale if recipe.guidance_scale is None else recipe.guidance_scale
        taught = defaults.num_inference_steps if recipe.teacher_steps is None else recipe.teacher_steps
        run, finer = (model.levels.schedule(SAMPLER, number) for number in (self.steps, taught))
        self.levels = run.sigmas.float()
        within = taught // self.steps  # steps of the model's own UNet in one of the draft
        if taught % self.steps or not torch.allclose(finer.sigmas[::within], run.sigmas):
            raise RecipeError(
                f"the {self.steps} levels of a draft are not among the {taught} of the model; let teacher_steps be a "
                "multiple of num_inference_steps, of a scheduler whose timestep_spacing is trailing"
            )
        networks = {name: part for name, part in model.parts().items() if isinstance(part, nn.Module)}
        # What is frozen moves to the device with the task.
        self.frozen = nn.ModuleList(networks.values())
        self.frozen.requires_grad_(False)
        restore_attention(model.unet)
        self.network = copy.deepcopy(model.unet).float().requires_grad_(True)
        if recipe.rank is not None:
            low_rank.add_lora(self.network, recipe.rank)
        use_attention(self.network, recipe.attention)
        self.skipped, folder = Skipped(), find(recipe.model)
        captions = captions_of(recipe, self.skipped)
        digests = [weights_digest(folder / name) for name in model.parts() if (folder / name).is_dir()]
        several = [caption for caption in captions for _ in range(recipe.num_images_per_prompt)]

        def teacher() -> TextToImage:
            return TextToImage.from_pretrained(recipe.model, dtype=recipe.teacher_dtype, runtime=recipe.teacher_runtime)

        options = TrajectoryOptions(finer, within, self.scale)
        place = Path(recipe.data) / ".cache" / "trajectories"
        computed = f"{recipe.teacher_dtype} {recipe.teacher_runtime} {' '.join(digests)}"
        self.dataset: Trajectories = Trajectories(several, trajectories(teacher, several, options, place, computed))
        self.reads = hashlib.sha256("\0".join([*digests, *captions]).encode()).hexdigest()
        self.num_validation = validation_size(len(captions)) * recipe.num_images_per_prompt
        self.conditions: dict[str, Condition] = {}  # what the UNet is told of each caption, worked out when first asked

    def start_from(self, folder: Path) -> None:
        """From a network for drafts of the same model; a LoRA from the nearest to it."""
        if self.recipe.rank is None:
            super().start_from(folder)
        else:
            other = drafts.read(folder, self.model.unet).unet
            low_rank.start_from(self.network, lora.between(self.model.unet, other, self.recipe.rank))

    def forward(self, batch: tuple[Tensor, list[str]], rng: torch.Generator) -> dict[str, Tensor]:
        """How far the student's step ends from where the model's own guided steps did, in the network's output."""
        points, captions = batch  # (B, P, C, h, w), B
        place = torch.randint(self.steps, (len(captions),), generator=rng, device=rng.device).cpu()
        rows = torch.arange(len(captions))
        x, there = points[rows, place], points[rows, place + 1]
        sigma, after = (self.levels[place + further].to(x.device) for further in (0, 1))
        # The clean estimate by which one step from x ends there.
        share = per_row(after / sigma, x)
        scaling = self.model.levels.scaling
        wanted = scaling.output((there - share * x) / (1 - share), x, sigma)
        given = scaling.network_input(x, sigma), scaling.timestep(sigma)
        output = self.model.call_unet(self.network, *given, Conditions(tuple(self._conditions_of(captions)))).float()
        return {"loss": (output - wanted).square().mean()}

    def measure(self, network: UNet2DConditionModel) -> dict[str, float]:
        """The same over held-back captions, at fixed places, of what is saved."""
        return {"held_back_error": self.validation_loss(self._saved(network), "loss")}

    @torch.no_grad()
    def sheet(self, network: UNet2DConditionModel) -> Image.Image:
        """Drafts of held-back captions, by what is saved."""
        captions = list(dict.fromkeys(self.dataset.captions[index] for index in self.validation_indices))[:24]
        painter = TextToImage(replace(self.model, unet=self._saved(network), clip=None, drafter=None))
        asked: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": 1.0, "sampler": SAMPLER}
        painted = painter(captions, **asked, prior=False, seed=0, rerank=False)
        assert isinstance(painted.images, list), "they are Pillow's"
        return captioned(painted.images, captions)

    def save(self, network: UNet2DConditionModel, folder: Path) -> None:
        """The UNet or its LoRA, and what it was trained for."""
        drafter = Drafter(low_rank.merge_lora(network), self.steps, self.scale)
        if self.recipe.rank is None:
            drafts.save(drafter, folder)
        else:
            drafts.save_low_rank(drafter, self.model.unet, self.recipe.rank, folder)

    def _saved(self, network: UNet2DConditionModel) -> UNet2DConditionModel:
        """The network as its users load it: a LoRA is written, and read again, in fewer bits."""
        if self.recipe.rank is None:
            return network
        with tempfile.TemporaryDirectory() as folder:
            self.save(network, Path(folder))
            return drafts.read(Path(folder), self.model.unet).unet

    @torch.no_grad()
    def _conditions_of(self, captions: list[str]) -> list[Condition]:
        """What the UNet is told of each caption; of all at once, so that a resumed run has the same bits."""
        captions_left = [] if self.conditions else list(dict.fromkeys(self.dataset.captions))
        for start in range(0, len(captions_left), READ_TOGETHER):
            some = captions_left[start : start + READ_TOGETHER]
            asked = Request(prompt=some, guidance_scale=1.0, seed=0, prior=False, rerank=False)
            candidates = resolve(asked, self.model.abilities).candidates
            with torch.autocast(self.model.device.type, enabled=False):
                pairs = self.model.encode_prompts(candidates, Table())
            self.conditions |= {caption: prompt for caption, (prompt, _) in zip(some, pairs, strict=True)}
        return [self.conditions[caption] for caption in captions]


def captions_of(recipe: DraftRecipe, skipped: Skipped) -> list[str]:
    """The first captions of the data, each once; DataError where there is none."""
    found: dict[str, None] = {}
    for example in find_examples(Path(recipe.data), skipped):
        if text := example.text.strip():
            found[text] = None
        else:
            skipped.add("empty caption", example.name)
    if not found:
        raise DataError(f"no caption in {recipe.data}")
    return list(found)[: recipe.num_captions]
