"""Train a network for drafts: a UNet that says in few steps, unguided, what a model's own says in many, guided.

Progressive distillation (Salimans & Ho 2022, Algorithm 2) in one round, of a guided model (Meng et al. 2023): of a
picture noised to a level of the draft, the model's own UNet takes the steps to the draft's next level, and the student
learns the clean estimate by which one step of DDIM ends at the same place. It starts from the model's weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from gen.attention import restore_attention
from gen.checkpoint import find
from gen.conditioning import Condition, Conditions, Table
from gen.drafter import SAMPLER, Drafter
from gen.families.autoencoder import KLModel
from gen.pipeline import TextToImage
from gen.request import Request
from samplers.sample import advance
from samplers.state import Prediction, State, per_row
from training.data.cache import encoded
from training.data.pictures import Pictures
from training.frozen import reads
from training.recipe import Recipe, RecipeError
from training.sheets import grid
from training.task import Task, held_back


class DraftRecipe(Recipe):
    """Keys of a recipe with `task: draft`."""

    task: Literal["draft"]
    model: str  # the model whose drafts it is to paint: a bundled name or a folder
    num_inference_steps: int = Field(5, gt=0)  # of a draft
    teacher_steps: int | None = Field(None, gt=0)  # of the model's own UNet, a multiple of these; None: its default
    guidance_scale: float | None = Field(None, ge=1)  # of that; None: its default
    attention: Literal["eager", "sdpa"] = "sdpa"  # eager trains 1.6x faster in bfloat16 on the CPU


Item = tuple[Tensor, str]
"""Latent (C, h, w) and caption."""


class Latents(Dataset[Item]):
    """What the autoencoder makes of every picture, and its caption."""

    def __init__(self, captions: list[str], latents: Tensor) -> None:
        self.captions, self.latents = captions, latents

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Item:
        return self.latents[index], self.captions[index]


class DraftTask(Task[UNet2DConditionModel]):
    """The squared error of the student's output at uniformly drawn levels of the draft."""

    def __init__(self, recipe: DraftRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        painter = TextToImage.from_pretrained(recipe.model, device="cpu")
        model, defaults = painter.model, painter.model.abilities.defaults
        if not isinstance(model, KLModel):
            raise RecipeError(f"model {recipe.model!r} has no KL autoencoder, which its pictures are read by")
        if defaults.height != defaults.width:
            raise RecipeError(f"model {recipe.model!r} paints {defaults.height}x{defaults.width} pixels, not a square")
        self.painter = model
        self.steps = recipe.num_inference_steps
        self.scale = defaults.guidance_scale if recipe.guidance_scale is None else recipe.guidance_scale
        taught = defaults.num_inference_steps if recipe.teacher_steps is None else recipe.teacher_steps
        run, self.finer = (model.levels.schedule(SAMPLER, number) for number in (self.steps, taught))
        self.levels = run.sigmas.float()
        self.within = taught // self.steps  # steps of the model's own UNet in one of the draft
        if taught % self.steps or not torch.allclose(self.finer.sigmas[:: self.within], run.sigmas):
            raise RecipeError(
                f"the {self.steps} levels of a draft are not among the {taught} of the model; let teacher_steps be a "
                "multiple of num_inference_steps, of a scheduler whose timestep_spacing is trailing"
            )
        # What is frozen moves to the device with the task.
        networks = {name: part for name, part in model.parts().items() if isinstance(part, nn.Module)}
        self.frozen = nn.ModuleList(networks.values())
        self.frozen.requires_grad_(False)
        restore_attention(model.unet)
        self.network = copy.deepcopy(model.unet).float().requires_grad_(True)
        if recipe.attention == "eager":
            for unet in (model.unet, self.network):
                unet.set_attn_processor(AttnProcessor())
        pictures = Pictures(recipe.data, defaults.height)
        folder = find(recipe.model)
        self.skipped, self.reads = pictures.skipped, reads(pictures, *(folder / name for name in networks))
        latents = encoded(pictures, folder / "vae", lambda pixels: model.encode(pixels.float() / 255))
        self.dataset: Latents = Latents([example.text for example in pictures.examples], latents)
        self.held = held_back(len(self.dataset))

    def groups(self) -> list[list[int]]:
        """All but the examples kept for `measure`."""
        return [[index] for index in range(len(self.dataset) - self.held)]

    def forward(self, batch: tuple[Tensor, list[str]], rng: torch.Generator) -> dict[str, Tensor]:
        """How far the student's step ends from where the model's own guided steps do, in the network's output."""
        x0, captions = batch  # (B, C, h, w), B
        place = torch.randint(self.steps, (len(captions),), generator=rng, device=rng.device).cpu()
        sigma = self.levels[place].to(x0.device)
        x = x0 + per_row(sigma, x0) * torch.randn(x0.shape, generator=rng, device=x0.device)
        with torch.no_grad():
            prompts, nulls = self._told(captions)
            there = self._taken(x, place * self.within, self.within, prompts, nulls)
            # The clean estimate by which one step from x ends there.
            share = per_row(self.levels[place + 1].to(x0.device) / sigma, x)
            wanted = self.painter.levels.scaling.output((there - share * x) / (1 - share), x, sigma)
        output = self._asked(self.network, x, sigma, prompts)
        return {"loss": (output - wanted).square().mean()}

    @torch.no_grad()
    def measure(self, network: UNet2DConditionModel) -> dict[str, float]:
        """The same over held-back pictures with fixed noise."""
        first = len(self.dataset) - self.held
        trained, self.network = self.network, network
        losses = []
        for start in range(first, len(self.dataset), 64):
            items = [self.dataset[index] for index in range(start, min(start + 64, len(self.dataset)))]
            latents, captions = zip(*items, strict=True)
            rng = torch.Generator(self.painter.device).manual_seed(start)
            losses.append(self((torch.stack(latents).to(self.painter.device), list(captions)), rng)["loss"])
        self.network = trained
        return {"held_back_error": torch.stack(losses).mean().item()}

    @torch.no_grad()
    def sheet(self, network: UNet2DConditionModel) -> Image.Image:
        """Drafts of held-back captions."""
        first = len(self.dataset) - min(self.held, 24)
        captions = self.dataset.captions[first:]
        painter = TextToImage(replace(self.painter, unet=network, clip=None, drafter=None))
        asked: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": 1.0, "sampler": SAMPLER}
        painted = painter(captions, **asked, seed=0, output_type="pt", rerank=False)
        assert isinstance(painted.images, Tensor), "output_type is pt"
        return grid(painted.images * 2 - 1, columns=8, captions=captions, scale=2)

    def save(self, network: UNet2DConditionModel, folder: Path) -> None:
        """The UNet, and what it was trained for."""
        Drafter(network, self.steps, self.scale).save(folder)

    def _told(self, captions: list[str]) -> tuple[list[Condition], list[Condition]]:
        """What the UNet is told of each caption, and what it is guided away from."""
        said = list(dict.fromkeys(captions))
        # guided by any scale, so that there is a null
        asked = Request(prompt=said, guidance_scale=2.0, seed=0, prior=False, rerank=False)
        candidates = asked.resolve(self.painter.abilities).candidates
        told = dict(zip(said, self.painter.tell(candidates, Table()), strict=True))
        pairs = [told[caption] for caption in captions]
        return [prompt for prompt, _ in pairs], [null for _, null in pairs if null is not None]

    def _asked(self, unet: UNet2DConditionModel, x: Tensor, sigma: Tensor, told: list[Condition]) -> Tensor:
        scaling = self.painter.levels.scaling
        given = scaling.network_input(x, sigma), scaling.timestep(sigma)
        return self.painter.asked(unet, *given, Conditions(tuple(told))).float()

    def _taken(self, x: Tensor, first: Tensor, steps: int, prompts: list[Condition], nulls: list[Condition]) -> Tensor:
        """Where so many guided steps of the model's own UNet end, from levels `first` (B,) of its run on."""

        def denoise(x: Tensor, sigma: Tensor) -> Prediction:
            return Prediction(self._guided(x, sigma, prompts, nulls))

        state = State(x)
        for step in range(steps):
            now, after = (self.finer.level(first + step + further, x.device) for further in (0, 1))
            state = advance(SAMPLER, denoise, state, now, after)
        return state.x

    def _guided(self, x: Tensor, sigma: Tensor, prompts: list[Condition], nulls: list[Condition]) -> Tensor:
        """What the model's own UNet takes for clean, with guidance."""
        twice = x.repeat(2, 1, 1, 1), sigma.repeat(2)
        output = self._asked(self.painter.unet, *twice, prompts + nulls)
        prompt, null = self.painter.levels.scaling.x0(output, *twice).chunk(2)
        return null + self.scale * (prompt - null)
