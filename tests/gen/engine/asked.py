"""What is asked of engines: requests of every kind, answered with their latents, alone and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gen import Engine, Request, TextToImage
from gen.flight import Account, Painted
from gen.request import Job
from gen.row import Live
from tests.engines import run

SECONDS = 120  # a wait that should never be needed

PLAIN = Request(prompt="a small red circle", seed=7, rerank=False, output_type="latent")
KINDS = [
    PLAIN,
    replace(PLAIN, prompt="a large blue square", seed=1, num_images_per_prompt=3),
    replace(PLAIN, guidance_scale=1.0, num_inference_steps=7),
    replace(PLAIN, guidance_scale=7.5, num_inference_steps=2, negative_prompt="a star"),
    replace(PLAIN, prompt=["a star", "a red square"], sampler="heun", num_inference_steps=3),
    replace(PLAIN, eta=0.7, noise_level=300, prior_guidance_scale=4.0),
    replace(PLAIN, prior=False, guidance_rescale=0.7, num_images_per_prompt=2),
    replace(PLAIN, height=32, width=96, guidance_interval=(0.5, 5.0)),
    replace(PLAIN, sampler="dpmpp_2m_sde", num_inference_steps=5, prior_num_inference_steps=6),
    replace(PLAIN, prompt=None, image_embeds=torch.ones(1, 16), sampler="unipc", num_inference_steps=4),
]

Latents = dict[int, Tensor]  # by their candidates' places in drawing order


def latents_of(job: Job, painted: Mapping[int, Painted], account: Account) -> Latents:
    return {index: each.latents for index, each in painted.items()}


def engine_of(model: TextToImage, **settings: Any) -> Engine[Latents]:
    """It answers with latents."""
    return Engine(model.model, latents_of, **settings)


def alone(model: TextToImage, request: Request) -> Latents:
    engine = engine_of(model)
    future = engine.submit(request)
    run(engine)
    return future.result(timeout=0)


def same(ours: Latents, theirs: Latents, within: float = 1e-5) -> bool:
    return ours.keys() == theirs.keys() and all(
        (x - theirs[index]).abs().max() <= within * theirs[index].abs().max().clamp(min=1) for index, x in ours.items()
    )


def decoder_rows(engine: Engine[Any]) -> list[Live]:
    """Those in flight in the decoder."""
    return engine._stages.rows["decoder"].live


def all_rows(engine: Engine[Any]) -> list[Live]:
    """Those in flight in every stage."""
    return [one for rows in engine._stages.rows.values() for one in rows.live]


class Refused(Exception):
    """An error that only a test raises."""
