"""Train the prior: from CLIP's reading of a caption to CLIP's view of a picture (Ramesh et al. 2022, section 2.2).

The network is diffusers' PriorTransformer. It predicts the clean image embedding, normalised to unit variance, and
drops its text at random for guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import DDIMScheduler, PriorTransformer
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from clip_core.retrieval import top1_of_n
from clip_core.score import cosine
from clip_core.text import with_projection
from gen.candidate import Candidate
from gen.conditioning import stacked
from gen.prior import Prior
from gen.scheduler import NoiseLevels
from gen.settings import Settings
from training.attention import AttentionRecipe, use_attention
from training.data.pictures import Pictures
from training.frozen import default_device, image_embeddings, load_clip, reads, transformers_model
from training.recipe import built, options_of
from training.sheets import captioned, pictures_of
from training.task import Task, validation_size


class PriorRecipe(AttentionRecipe):
    """Keys of a recipe with `task: prior`."""

    task: Literal["prior"]
    clip: str  # the folder of a trained CLIP
    resolution: int = Field(gt=0)  # pixels
    network: Annotated[  # PriorTransformer's configuration; widths and lengths follow from CLIP
        dict[str, Any], options_of(PriorTransformer, ["embedding_dim", "num_embeddings"])
    ]
    scheduler: Annotated[dict[str, Any], options_of(DDIMScheduler)]  # prediction_type is `sample`
    drop_text: float = Field(0.1, ge=0, lt=1)


class Embedded(Dataset[tuple[Tensor, str]]):
    """Image embedding (E,) and caption of every picture."""

    def __init__(self, dataset: Pictures, embeddings: Tensor) -> None:
        self.captions = [example.text for example in dataset.examples]
        self.embeddings = embeddings

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.embeddings[index], self.captions[index]


class PriorTask(Task[PriorTransformer]):
    """The squared error of the predicted embedding at uniformly drawn timesteps."""

    def __init__(self, recipe: PriorRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        clip = load_clip(recipe.clip, default_device())
        network = transformers_model(clip)
        use_attention(network, recipe.attention)
        self.text_encoder, self.tokenizer = with_projection(network), clip.tokenizer
        self.pictures = Pictures(recipe.data, recipe.resolution)
        self.skipped, self.reads = self.pictures.skipped, reads(self.pictures, recipe.clip)
        embeddings = image_embeddings(self.pictures, clip, recipe.clip)
        self.dataset: Embedded = Embedded(self.pictures, embeddings)
        self.num_validation = validation_size(len(self.dataset))
        width = embeddings.shape[1]
        if (text_width := network.config.text_config.hidden_size) != width:
            raise ValueError(
                f"{recipe.clip}: the text width is {text_width} and the embedding width"
                f" {width}; a PriorTransformer needs them equal"
            )
        torch.manual_seed(recipe.train.seed)
        sizes = {"embedding_dim": width, "num_embeddings": clip.tokenizer.model_max_length}
        self.network = built(PriorTransformer, "network", {**recipe.network, **sizes})
        use_attention(self.network, recipe.attention)
        # normalisation is measured from the data and saved with the weights; it is not trained
        self.network.clip_mean.requires_grad_(False).copy_(embeddings.mean(dim=0, keepdim=True))
        self.network.clip_std.requires_grad_(False).copy_(embeddings.std(dim=0, keepdim=True).clamp(min=1e-6))
        self.levels = NoiseLevels.of(built(DDIMScheduler, "scheduler", recipe.scheduler), "recipe key 'scheduler'")
        self.reader = self.prior(self.network)  # which keeps the empty prompt once it has read it

    def prior(self, network: PriorTransformer) -> Prior:
        """The prior as generation uses it."""
        return Prior(network, self.tokenizer, self.text_encoder, self.levels)

    def forward(self, batch: tuple[Tensor, list[str]], rng: torch.Generator) -> dict[str, Tensor]:
        """The loss at random timesteps."""
        embeddings, captions = batch
        rows, device = len(captions), embeddings.device
        x0 = (embeddings - self.network.clip_mean) / self.network.clip_std  # (B, E)
        dropped = torch.rand(rows, generator=rng, device=device) < self.recipe.drop_text
        words = ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
        with torch.no_grad():
            conditions = self.reader.conditions(words)
        scaling = self.levels.scaling
        timestep = torch.randint(self.levels.num_train_timesteps, (rows,), generator=rng, device=device)
        sigma = scaling.sigma(timestep)
        eps = torch.randn(x0.shape, generator=rng, device=device)
        output = self.network(
            scaling.network_input(x0 + sigma[:, None] * eps, sigma),
            timestep,
            proj_embedding=stacked([each.pooled_projections for each in conditions]),
            encoder_hidden_states=stacked([each.encoder_hidden_states for each in conditions]),
            attention_mask=stacked([each.attention_mask for each in conditions]),
        ).predicted_image_embedding.float()
        return {"loss": F.mse_loss(output, scaling.target(x0, eps, sigma))}

    @torch.no_grad()
    def measure(self, network: PriorTransformer) -> dict[str, float]:
        """Cosine between sampled and true embeddings of held-back pictures, and top 1 of 100 by it."""
        embeddings, captions = self.batch_of(self.validation_indices[:200])
        sampled, true = self._sample(network, captions) - network.clip_mean, embeddings - network.clip_mean
        pool = min(100, len(captions))
        whole = len(captions) // pool * pool
        return {
            "cosine": cosine(sampled, true).mean().item(),
            f"top1_of_{pool}": top1_of_n(sampled[:whole], true[:whole], pool),
        }

    @torch.no_grad()
    def sheet(self, network: PriorTransformer) -> Image.Image:
        """Held-back captions, each under the held-back picture nearest to its sampled embedding."""
        embeddings, captions = self.batch_of(self.validation_indices)
        captions = captions[:24]
        sampled = F.normalize(self._sample(network, captions) - network.clip_mean, dim=-1)
        nearest = (sampled @ F.normalize(embeddings - network.clip_mean, dim=-1).T).argmax(dim=1)
        pixels = torch.stack([self.pictures[self.validation_indices[index]][0] for index in nearest.tolist()])
        return captioned(pictures_of(pixels), captions)

    def save(self, network: PriorTransformer, folder: Path) -> None:
        """The prior in `folder`, its scheduler in a folder inside."""
        network.save_pretrained(folder)
        self.levels.stock.save_pretrained(folder / "scheduler")

    def _sample(self, network: PriorTransformer, captions: Sequence[str]) -> Tensor:
        settings = Settings(prior=True, prior_num_inference_steps=20, prior_guidance_scale=1.0)
        asked = [Candidate(prompt=text, seed=seed, settings=settings) for seed, text in enumerate(captions)]
        return self.prior(network).sample(asked)
