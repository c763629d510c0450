"""Stable Diffusion 1.x and 2.x: the UNet reads the text tower's states by cross-attention, and nothing else.

1.x reads the last of CLIP-L's twelve layers, 2.x the last of the 23 that are kept of OpenCLIP-H's 24, both after the
final norm; what they pad with is in the tokenizer's files, eps or v in the scheduler's. A safety checker and its
feature extractor are not loaded and not saved.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffusers import UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from clip_core.text import TextTower
from gen.checkpoint import Parts
from gen.families.autoencoder import KLModel
from gen.families.base import listed
from gen.families.reader import Reader
from gen.model_index import UNUSED
from gen.scheduler import NoiseLevels
from gen.settings import JSON

logger = logging.getLogger(__name__)

# As stock's pipelines read configurations that are older than these options: for text to image, and for inpainting.
MEANT = {"steps_offset": 1, "clip_sample": False}
MEANT_INPAINTING = {"steps_offset": 1, "skip_prk_steps": True}
SIZED_SINCE = (0, 9)  # of diffusers; before, a UNet's sample_size below 64 was never meant
MEANT_SIZE = 64


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StableDiffusion(KLModel, Reader):
    """A loaded Stable Diffusion 1.x or 2.x."""

    SAVED_AS: ClassVar[str] = "StableDiffusionPipeline"
    INPAINTS_AS: ClassVar[str | None] = "StableDiffusionInpaintPipeline"
    STOCK_DEFAULTS: ClassVar[dict[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 7.5}

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """Put the parts of a folder together; ValueError when one is missing or two do not fit."""
        got = listed(parts, ["unet", "vae", "tokenizer", "text_encoder", "scheduler"])
        where = str(parts.folder / "scheduler")
        meant = MEANT_INPAINTING if parts.family == cls.INPAINTS_AS else MEANT
        model = cls(
            unet=with_meant_size(got["unet"], str(parts.folder / "unet")),
            vae=got["vae"],
            text=TextTower(got["tokenizer"], got["text_encoder"]),
            levels=NoiseLevels.of(as_meant(got["scheduler"], meant, where), where),
            clip=parts.clip,
            card=parts.card,
        )
        model.check(str(parts.folder))
        return model

    def required_config(self) -> dict[str, tuple[object, object]]:
        """What is given, and what the other parts need, by its name."""
        nothing = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
        return super().required_config() | {f"unet {name}": (getattr(self.unet.config, name), None) for name in nothing}

    @property
    def index(self) -> dict[str, JSON]:
        """What model_index.json says beside the parts."""
        left_out: dict[str, JSON] = {name: [None, None] for name in UNUSED}
        return left_out | {"requires_safety_checker": False}


def as_meant(scheduler: SchedulerMixin, meant: Mapping[str, object], where: str) -> SchedulerMixin:
    """A scheduler as stock's pipeline reads it, which is not always what its file says; then the log says so."""
    options = {name: value for name, value in meant.items() if scheduler.config.get(name, value) != value}
    if options:
        logger.warning("%s is older than the options %s, which are read so, as diffusers does", where, options)
    # never clipping also stands in the configuration of a class that does not clip, for those that are built from it
    never = {"clip_sample": meant["clip_sample"]} if "clip_sample" in meant else {}
    scheduler.register_to_config(**(options | never))
    return scheduler


def with_meant_size(unet: UNet2DConditionModel, where: str) -> UNet2DConditionModel:
    """A UNet with the size that stock's pipeline paints at, which is not always what its file says."""
    saved_by, size = unet.config.get("_diffusers_version"), unet.config.sample_size
    is_older = saved_by is not None and tuple(int(number) for number in saved_by.split(".")[:2]) < SIZED_SINCE
    if is_older and isinstance(size, int) and size < MEANT_SIZE:
        logger.warning("%s: sample_size %d of diffusers %s is read as %d", where, size, saved_by, MEANT_SIZE)
        unet.register_to_config(sample_size=MEANT_SIZE)
    return unet
