"""Train CLIP: pictures and captions into one space (Radford et al. 2021, Figure 3).

The network is transformers' CLIPModel with a byte-level tokenizer learned from the captions. Rows that share a `group`
meet in one batch, so the hard negatives of a data set (Yuksekgonul et al. 2023) do their work; a captioner may teach
the picture's tower beside (captioner.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from clip_core.clip import CLIP
from clip_core.convert import save_transformers
from clip_core.load import load_tokenizer
from clip_core.loss import clamp_logit_scale_, contrastive_loss, equal_captions
from clip_core.preprocess import Preprocess
from clip_core.retrieval import top1_of_n
from clip_core.text import Tokens
from clip_core.tokenizer import train_tokenizer
from training.attention import AttentionRecipe, use_attention
from training.captioner import Captioner
from training.checkpoints import load_weights
from training.data.pictures import Pictures
from training.recipe import built, options_of
from training.sheets import captioned, pictures_of
from training.soften import soften
from training.task import Task, validation_size
from training.vision_start import place_patches_, whiten_patches_

Channels = tuple[float, float, float]

FILLED_IN = (  # options of the towers that the tokenizer and the recipe's other keys decide
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"),
    *("max_position_embeddings", "projection_dim", "image_size"),
)


class ClipRecipe(AttentionRecipe):
    """Keys of a recipe with `task: clip`."""

    task: Literal["clip"]
    resolution: int = Field(gt=0)  # pixels
    vocab_size: int = Field(1024, ge=514)  # at most; 514 is bytes alone
    max_length: int = Field(32, ge=3)  # tokens of a caption, both ends included
    projection_dim: int = Field(gt=0)  # E
    text: Annotated[dict[str, Any], options_of(CLIPTextConfig, FILLED_IN)]
    vision: Annotated[dict[str, Any], options_of(CLIPVisionConfig, FILLED_IN)]
    caption_weight: float = Field(0.0, ge=0)  # of the captioner's loss beside the contrastive one; 0: no captioner
    caption_layers: int = Field(2, gt=0)
    soften: float = Field(0.0, ge=0, le=1)  # share of pictures that are shown warped and blurred


class CLIPWithCaptioner(nn.Module):
    """CLIP and what is trained with it and thrown away."""

    def __init__(self, clip: CLIPModel, captioner: Captioner | None) -> None:
        super().__init__()
        self.clip = clip
        self.captioner = captioner


class ClipTask(Task[CLIPWithCaptioner]):
    """Symmetric InfoNCE over all processes' batches, equal captions counted as matches; a captioner's loss if asked."""

    def __init__(self, recipe: ClipRecipe) -> None:
        super().__init__()
        self.dataset: Pictures = Pictures(recipe.data, recipe.resolution)
        self.skipped, self.reads = self.dataset.skipped, self.dataset.digest
        self.tokenizer = self._tokenizer(recipe)
        ids = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,  # never 2, which transformers pools by a legacy rule
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        options = {
            "projection_dim": recipe.projection_dim,
            "text_config": {
                **recipe.text,
                **ids,
                "vocab_size": len(self.tokenizer),
                "max_position_embeddings": recipe.max_length,
                "projection_dim": recipe.projection_dim,
            },
            "vision_config": {
                **recipe.vision,
                "image_size": recipe.resolution,
                "projection_dim": recipe.projection_dim,
            },
        }
        torch.manual_seed(recipe.train.seed)
        clip = built(CLIPModel, "text, vision", {"config": built(CLIPConfig, "text, vision", options)})
        use_attention(clip, recipe.attention)
        self.caption_weight, self.soften = recipe.caption_weight, recipe.soften
        captioner = None
        if recipe.caption_weight:
            sizes = (len(self.tokenizer), recipe.max_length, recipe.projection_dim)
            captioner = Captioner(*sizes, recipe.caption_layers)
        self.network = CLIPWithCaptioner(clip, captioner)
        self.num_validation = validation_size(len(self.dataset))
        sample = _sample(self.dataset)
        mean, std = _channel_statistics(sample)
        size = recipe.resolution
        self.preprocess = Preprocess(resize=size, crop=(size, size), mean=mean, std=std)
        start = clip.vision_model.embeddings
        place_patches_(start.position_embedding.weight)
        whiten_patches_(start.patch_embedding.weight, self.preprocess.from_pixels(sample))

    def start_from(self, folder: Path) -> None:
        """The weights of a CLIP; a captioner always starts anew."""
        load_weights(self.network.clip, folder)

    def clip(self, network: CLIPWithCaptioner) -> CLIP:
        """The CLIP as everyone else will read it."""
        return CLIP(network.clip, self.tokenizer, self.preprocess)

    def groups(self) -> list[list[int]]:
        """All but the examples kept for `measure`."""
        groups = (
            [index for index in group if index < self.validation_indices.start] for group in self.dataset.groups()
        )
        return [group for group in groups if group]

    def forward(self, batch: tuple[Tensor, list[str]], rng: torch.Generator) -> dict[str, Tensor]:
        """The contrastive loss, and how many captions find their own picture in the batch."""
        pixels, captions = batch
        clip = self.network.clip
        clamp_logit_scale_(clip.logit_scale.detach())  # what the last optimiser step left
        tokens = self._tokens(captions)
        image, text = self._embed(self.network, soften(pixels.float() / 255, self.soften, rng), tokens)
        losses: dict[str, Tensor] = {}
        if self.network.captioner is not None:
            ids, mask = (each.to(image.device) for each in (tokens.input_ids, tokens.attention_mask))
            losses["caption"] = self.network.captioner(image, ids, mask)
        if dist.is_initialized() and dist.get_world_size() > 1:
            image, text = AllGather.apply(image), AllGather.apply(text)
            everyones: list[list[str]] = [[]] * dist.get_world_size()
            dist.all_gather_object(everyones, list(captions))
            captions = [caption for part in everyones for caption in part]
        losses["contrast"] = contrastive_loss(image, text, clip.logit_scale, equal_captions(captions, image.device))
        with torch.no_grad():
            own = (F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T).argmax(dim=0)
            right = (own == torch.arange(len(captions), device=image.device)).float().mean()
        loss = losses["contrast"] + self.caption_weight * losses.get("caption", 0.0)
        return {"loss": loss, **losses, "batch_top1": right, "temperature": clip.logit_scale.detach().float().exp()}

    @torch.no_grad()
    def measure(self, network: CLIPWithCaptioner) -> dict[str, float]:
        """Text to image retrieval, top 1 of 100 held-back pairs, averaged over as many hundreds as there are."""
        pixels, captions = self.batch_of(self.validation_indices)
        image, text = self._embed(network, pixels / 255, self._tokens(captions))
        pool = min(100, len(captions))
        whole = len(captions) // pool * pool
        return {f"retrieval_top1_of_{pool}": top1_of_n(text[:whole], image[:whole], pool)}

    @torch.no_grad()
    def sheet(self, network: CLIPWithCaptioner) -> Image.Image:
        """Held-back captions, each under the picture that the network thinks it tells of."""
        pixels, captions = self.batch_of(self.validation_indices[:32])
        image, text = self._embed(network, pixels / 255, self._tokens(captions))
        best = (F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T).argmax(dim=1)
        return captioned(pictures_of(pixels[best]), captions)

    def save(self, network: CLIPWithCaptioner, folder: Path) -> None:
        """A transformers CLIP folder with tokenizer and preprocessing."""
        save_transformers(self.clip(network), folder)

    def _tokenizer(self, recipe: ClipRecipe) -> CLIPTokenizer:
        """The one that the network to start from was trained with, or one learned from the captions."""
        if recipe.init is not None:
            return load_tokenizer(Path(recipe.init))
        return train_tokenizer(
            (example.text for example in self.dataset.examples), recipe.vocab_size, recipe.max_length
        )

    def _tokens(self, captions: Sequence[str]) -> Tokens:
        """(B, L) of a batch; padding to the longest is enough, and quicker: the text tower is causal."""
        batch = self.tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt")
        return Tokens(batch.input_ids, batch.attention_mask.bool())

    def _embed(self, network: CLIPWithCaptioner, pixels: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(B, E) each, not normalised; pixels (B, 3, H, W) in [0, 1]."""
        clip = self.clip(network)
        return clip.image(pixels), clip.text(tokens).embedding


class AllGather(torch.autograd.Function):
    """Every process's rows in the order of processes, (world * B, E); each gets the gradient of its own from all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """The rows of all."""
        everyones = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, rows.contiguous())
        return torch.cat(everyones)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum over all processes, which each computed the whole loss; their mean follows as for every weight."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _sample(dataset: Pictures, most: int = 1000) -> Tensor:
    """About `most` pictures (N, 3, H, W) in [0, 1], evenly from the whole data set."""
    step = max(1, len(dataset) // most)
    return torch.stack([dataset[index][0] for index in range(0, len(dataset), step)]).float() / 255


def _channel_statistics(pictures: Tensor) -> tuple[Channels, Channels]:
    """Mean and deviation of each colour channel."""
    (*mean,) = pictures.mean(dim=(0, 2, 3)).tolist()
    (*std,) = pictures.std(dim=(0, 2, 3)).clamp(min=1e-3).tolist()
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
