"""Kandinsky 2.2 and 2.1 by diffusers' own pipelines: the pictures that our seeds stand for.

Their prior steps by UnCLIPScheduler in float64 here, for in float32 that gives x0 the weight 1.0015 at last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mended import MendedUnCLIP
from tests.stock import SEED, draws
from tests.tiny_kandinsky import KINDS

SIZE = {"height": 64, "width": 64}
STEPS = {"num_inference_steps": 4, "prior_num_inference_steps": 3}


def seeds_of(prompts: Sequence[str], n: int) -> list[int]:
    return [SEED + k for _ in prompts for k in range(n)]


@dataclass(frozen=True)
class Stock:
    """Diffusers' two pipelines, asked as they can be: each prompt for itself as often as it has pictures."""

    version: str
    decoder: Any
    prior: Any

    @classmethod
    def of(cls, version: str, decoder: Any, prior: Any) -> Stock:
        prior.scheduler = MendedUnCLIP(**prior.scheduler.config)
        for pipeline in (decoder, prior):
            pipeline.set_progress_bar_config(disable=True)
        return cls(version, decoder, prior)

    def embeds(self, prompts: list[str], n: int, negative: list[str] | None, guidance: float) -> tuple[Tensor, Tensor]:
        seeds = seeds_of(prompts, n)
        rngs = draws("prior", seeds) + (draws("negative_prior", seeds) if negative else [])
        steps = STEPS["prior_num_inference_steps"]
        asked: dict[str, Any] = {"num_images_per_prompt": n, "guidance_scale": guidance, "num_inference_steps": steps}
        output = self.prior(prompts, negative_prompt=negative, generator=rngs, **asked)
        return output.image_embeds, output.negative_image_embeds

    def paint(
        self,
        embeds: tuple[Tensor, Tensor],
        prompts: list[str],
        n: int = 1,
        negative: list[str] | None = None,
        **asked: Any,
    ) -> tuple[Tensor, list[Image.Image]]:
        """Final latents, which 2.1 does not give by itself, and pictures."""
        asked = {"num_inference_steps": STEPS["num_inference_steps"], **SIZE} | asked
        last: dict[str, Tensor] = {}
        asked |= {"callback": lambda step, timestep, latents: last.update(latents=latents), "callback_steps": 1}
        asked |= {"generator": draws("decoder", seeds_of(prompts, n)), "output_type": "pil"}
        asked |= {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}
        if self.version == "2.1":
            asked["prompt"] = [prompt for prompt in prompts for _ in range(n)]
            if negative:
                asked["negative_prompt"] = [text for text in negative for _ in range(n)]
        pictures = self.decoder(**asked).images
        return last["latents"], pictures


def stock_of(version: str, folders: dict[str, Path]) -> Stock:
    decoder, prior, _ = KINDS[version, False]
    return Stock.of(version, decoder.from_pretrained(folders["decoder"]), prior.from_pretrained(folders["prior"]))
