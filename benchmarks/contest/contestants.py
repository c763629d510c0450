"""The two that paint: stock diffusers ranked by stock transformers, and this project by its Python face.

Both paint the same candidates of a task. They know no processes, no turns and nothing of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from contest.models import no_image_encoder
from contest.tasks import SEED, Task
from contest.ways import Way
from gauges import now
from gen import TextToImage
from gen.answer import as_output
from gen.model_folder import find
from options import PROMPT

FEW = 2  # steps by which a batch size is tried, and by which all is compiled and planned


class Contestant(Protocol):
    """One that paints the candidates of a task."""

    task: Task

    def paint(self) -> list[int]:
        """All there is to do, which is what is timed; the candidates kept, best first."""

    def warm_up(self) -> None:
        """The same in few steps, which asks each network what `paint` asks it."""

    def latents(self) -> Tensor:
        """The final latents (N, C, h, w) of all candidates."""

    def pictures(self) -> np.ndarray:
        """All candidates as 8-bit pictures (N, H, W, 3)."""

    def rank(self, pictures: np.ndarray) -> list[int]:
        """Which of these pictures it would keep, best first."""

    def prepare(self, way: Way) -> dict[str, Any]:
        """Do what the way wants before a backend takes the networks over; what is to be told of it."""

    def parts(self) -> dict[str, list[nn.Module]]:
        """Its networks, by what they are for."""


@dataclass(eq=False)
class Peer:
    """Stock diffusers, then a ranking by stock transformers."""

    pipeline: Any
    clip: Any
    tokenizer: Any
    processor: Any
    task: Task
    is_tuned: bool
    batch_size: int
    final: list[Tensor] = field(
        default_factory=list
    )  # latents (B, C, h, w) of each batch, as painted last; empty: not yet

    @classmethod
    def load(cls, task: Task, dtype: torch.dtype, is_tuned: bool) -> "Peer":
        folder = find(task.model)
        pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
            folder, torch_dtype=dtype, image_encoder=no_image_encoder().to(dtype), feature_extractor=None
        ).to(task.device)
        pipeline.set_progress_bar_config(disable=True)
        # From the text alone: zeros over the whole class input, where stock would put the sinusoids of a noise level.
        pipeline.noise_image_embeddings = lambda image_embeds, **_: torch.cat([image_embeds, image_embeds], dim=1)
        clip = CLIPModel.from_pretrained(folder / "clip", dtype=dtype).to(task.device).eval()
        if is_tuned:
            channels_last(pipeline.unet, pipeline.vae)
        return cls(
            pipeline=pipeline,
            clip=clip,
            tokenizer=CLIPTokenizer.from_pretrained(folder / "clip"),
            processor=CLIPImageProcessor.from_pretrained(folder / "clip"),
            task=task,
            is_tuned=is_tuned,
            batch_size=task.number,
        )

    def paint(self) -> list[int]:
        return self._kept(self.task.steps)

    def warm_up(self) -> None:
        self._kept(FEW)

    def _kept(self, steps: int) -> list[int]:
        if not self.is_tuned:
            return self._rank(self._painted("pil", steps))
        pixels = torch.stack(self._painted("pt", steps))
        return self.task.best(self._scores(self._prepared(pixels.float(), do_rescale=False), [PROMPT]))

    def latents(self) -> Tensor:
        return torch.cat(self._final())

    @torch.no_grad()
    def pictures(self) -> np.ndarray:
        vae = self.pipeline.vae
        pixels = [
            vae.decode(batch / vae.config.scaling_factor, return_dict=False)[0].clone() for batch in self._final()
        ]
        found = self.pipeline.image_processor.postprocess(torch.cat(pixels), output_type="pil")
        return np.stack([np.asarray(picture) for picture in found])

    def rank(self, pictures: np.ndarray) -> list[int]:
        return self._rank([Image.fromarray(each) for each in pictures])

    def _final(self) -> list[Tensor]:
        """As `paint` left them, so that they need not be painted again."""
        if not self.final:
            self._painted("latent", self.task.steps)
        return self.final

    def parts(self) -> dict[str, list[nn.Module]]:
        return {
            "UNet": [self.pipeline.unet],
            "VAE": [self.pipeline.vae.decoder],
            "CLIP": [self.clip.vision_model],
            "text": [self.pipeline.text_encoder, self.clip.text_model],
        }

    def prepare(self, way: Way) -> dict[str, Any]:
        if way.backend == "inductor":
            self.pipeline.fuse_qkv_projections()
        searched = self.search() if way.is_tuned else {}
        return {"batch_size": self.batch_size, "searched_seconds": searched}

    def search(self) -> dict[int, float]:
        """Take the batch size that paints all candidates soonest; seconds of each that divides them."""
        took = {}
        for size in sizes_of(self.task.number):
            self.batch_size = size
            took[size] = min(self._seconds() for _ in range(2))  # the first call of a shape plans
        self.batch_size = min(took, key=lambda size: took[size])
        return took

    def _seconds(self) -> float:
        began = now(self.task.device)
        self._painted("pt", FEW)
        return now(self.task.device) - began

    def _painted(self, output_type: str, steps: int) -> list[Any]:
        """All candidates, a batch after the other."""
        unet, found, last = self.pipeline.unet, list[Any](), dict[int, Tensor]()
        empty = torch.zeros(1, self.pipeline.image_normalizer.config.embedding_dim, dtype=unet.dtype)
        for first in range(0, self.task.number, self.batch_size):
            seeds = self.task.seeds[first : first + self.batch_size]
            found += self.pipeline(
                prompt=PROMPT,
                image_embeds=empty.to(unet.device),
                num_images_per_prompt=len(seeds),
                latents=noise_of(seeds, unet).to(unet.device, unet.dtype),
                num_inference_steps=steps,
                guidance_scale=self.task.guidance_scale,
                output_type=output_type,
                callback=lambda step, timestep, latents, first=first: last.__setitem__(first, latents),
            ).images
        self.final = list(last.values()) if steps == self.task.steps else []
        return found

    def _rank(self, pictures: list[Image.Image]) -> list[int]:
        return self.task.best(self._scores(self._prepared(pictures), [PROMPT] * len(pictures)))

    def _prepared(self, images: list[Image.Image] | Tensor, do_rescale: bool = True) -> Tensor:
        prepared: Tensor = self.processor(images=images, do_rescale=do_rescale, return_tensors="pt").pixel_values
        return prepared

    @torch.no_grad()
    def _scores(self, pixel_values: Tensor, texts: list[str]) -> Tensor:
        """Of each picture with its text, or with the one text."""
        words = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        answer = self.clip(**words, pixel_values=pixel_values.to(self.clip.device, self.clip.dtype))
        scores: Tensor = answer.logits_per_image[:, 0]  # all texts are equal
        return scores


def noise_of(seeds: Sequence[int], unet: Any) -> Tensor:
    """What one CPU generator per picture draws in float32, in every precision the same."""
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sizes_of(number: int) -> list[int]:
    """The powers of two that divide a number, and itself: batches of equal size."""
    powers = [1 << power for power in range(number.bit_length()) if number % (1 << power) == 0]
    return sorted({*powers, number})


@dataclass(eq=False)
class Ours:
    """This project, by its Python face."""

    model: TextToImage
    task: Task

    @classmethod
    def load(cls, task: Task, dtype: torch.dtype, is_tuned: bool, runtime: str = "torch") -> "Ours":
        model = TextToImage.from_pretrained(task.model, device=task.device, dtype=dtype, runtime=runtime)
        if is_tuned:
            channels_last(model.model.unet, model.model.vae)
        return cls(model, task)

    def paint(self) -> list[int]:
        return [seed - SEED for seed in self._painted(keep=self.task.keep).seeds]

    def warm_up(self) -> None:
        self._painted(keep=self.task.keep, steps=FEW)

    @cached_property
    def _latents(self) -> Tensor:
        latents = self._painted(rerank=False, output_type="latent").images
        assert isinstance(latents, Tensor), "output_type is latent"
        return latents

    def latents(self) -> Tensor:
        return self._latents

    @torch.no_grad()
    def pictures(self) -> np.ndarray:
        pixels = self.model.model.decode(self.latents().to(self.task.device))
        return np.stack([np.asarray(picture) for picture in as_output(pixels.unbind(0), "pil")])

    def rank(self, pictures: np.ndarray) -> list[int]:
        assert self.model.model.clip is not None, "a model that is measured can rank"
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)
        return self.task.best(self.model.model.clip.score(pixels, PROMPT))

    def parts(self) -> dict[str, list[nn.Module]]:
        model = self.model.model
        assert model.clip is not None, "a model that is measured can rank"
        return {
            "UNet": [model.unet],
            "VAE": [model.vae.decoder],
            "CLIP": [model.clip.model.vision_model],
            "text": [model.text.encoder, model.clip.model.text_model],
        }

    def prepare(self, way: Way) -> dict[str, Any]:
        if way.backend is not None:
            self.warm_up()  # the first time measures memory, which is not to be compiled
        return {}

    def _painted(
        self, keep: int | None = None, rerank: bool | None = None, output_type: str = "pil", steps: int | None = None
    ) -> Any:
        return self.model(
            PROMPT,
            num_images_per_prompt=self.task.number,
            keep=keep,
            rerank=rerank,
            seed=SEED,
            num_inference_steps=steps or self.task.steps,
            guidance_scale=self.task.guidance_scale,
            prior=False,
            output_type=output_type,
        )


def channels_last(*networks: nn.Module) -> None:
    """Lay out the weights of convolutions as the fast kernels want them."""
    for network in networks:
        nn.Module.to(network, memory_format=torch.channels_last)
