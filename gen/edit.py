"""What rows begin with where a picture is handed in: image to image, and inpainting.

The user's words (`image`, `mask_image`, `strength`) become where a row's schedule begins, the latents that are noised
for it, what is held of it and what a UNet for inpainting is told beside it. It knows no rows in flight and no files.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gen.candidate import Candidate
from gen.conditioning import Condition, ConditionPair
from gen.model import Family, tiling
from gen.row import KnownRegion
from gen.scheduler import NoiseLevels
from gen.settings import Settings
from gen.source import Filter, is_white
from samplers.noise import noise
from samplers.schedule import Schedule

STAGE = "decoder"  # whose noise all of this is drawn from


class Posterior(NamedTuple):
    """What an autoencoder says of a picture: latents (C, h, w) float32, normally distributed around a mean."""

    mean: Tensor
    deviation: Tensor | None = None  # None: it is sure


@dataclass(frozen=True, eq=False)
class Beside:
    """What a UNet for inpainting sees beside x."""

    masked: Posterior  # of the picture without what is painted anew
    mask: Tensor  # (1, h, w) float32, as the UNet takes it
    mask_first: bool  # whether it stands before the picture's channels


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What a model makes of a picture and its mask, once for all who are given both."""

    image: Posterior
    is_painted: Tensor | None = None  # (1, h, w) bool; None: all of it is
    is_held: bool = False  # whether the rest is held while that is painted
    beside: Beside | None = None  # None: its UNet sees nothing but x


@runtime_checkable
class WithEncoder(Protocol):
    """A family that can begin with a picture."""

    @property
    def resized_by(self) -> Filter:
        """How pictures are brought to the size that is painted."""

    def read_picture(self, pixels: Tensor, white: Tensor | None) -> EncodedImage:
        """Of pixels (3, H, W) in [0, 1], and where they are painted anew: (1, H, W) bool; None: everywhere."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """What the row of one candidate begins with."""

    drawn: int = 0  # blocks of noise drawn before its first step beyond that of its start; -1: its start draws none
    start: Tensor | None = None  # unit noise; None: block 0 of its seed's
    origin: Tensor | None = None  # latents that it is added to; None: it begins with noise alone
    known_region: KnownRegion | None = None
    concat_channels: Tensor | None = None  # what the UNet is told beside x

    def with_concat_channels(self, pair: ConditionPair) -> ConditionPair:
        """What a candidate is told, with the channels beside x."""
        if self.concat_channels is None:
            return pair
        prompt, null = pair
        return self._beside(prompt), None if null is None else self._beside(null)

    def _beside(self, condition: Condition) -> Condition:
        return replace(condition, concat_channels=self.concat_channels)


def schedule_of(levels: NoiseLevels, settings: Settings, draft_steps: int | None = None) -> Schedule:
    """The levels of a candidate's run, or of a draft of it in so many steps; ValueError where it takes no step."""
    if draft_steps is None:
        share = settings.denoising_start, settings.denoising_end
        run = levels.schedule(settings.sampler, settings.num_inference_steps, settings.skipped_steps, *share)
        if run.num_steps < 1:
            given = f"strength={settings.strength}, denoising_start={share[0]} and denoising_end={share[1]}"
            raise ValueError(
                f"{given} leave none of {settings.num_inference_steps} steps; let them be further apart, "
                "or give more num_inference_steps"
            )
        return run
    # as many of a whole run's steps as leave so many of them
    whole = min(max(round(draft_steps / settings.strength), draft_steps), levels.num_train_timesteps)
    return levels.schedule(settings.sampler, whole, whole - draft_steps)


def read(model: Family, candidates: Sequence[Candidate]) -> list[EncodedImage | None]:
    """What the autoencoder says of each candidate's picture; one call for each picture, whoever is given it."""
    known: dict[Hashable, EncodedImage] = {}
    answers: list[EncodedImage | None] = []
    for one in candidates:
        if one.image_latents is not None:
            answers.append(EncodedImage(Posterior(one.image_latents)))
            continue
        if one.image is None:
            answers.append(None)
            continue
        reader = tiling(model, one.settings.vae_tiling)
        assert isinstance(reader, WithEncoder), "a picture is refused by a model that cannot read it"
        size = one.settings.height, one.settings.width
        key = (id(one.image), id(one.mask_image), size, one.settings.vae_tiling)
        if key not in known:
            known[key] = _read(reader, one, *size)
        answers.append(known[key])
    return answers


def _read(model: WithEncoder, candidate: Candidate, height: int, width: int) -> EncodedImage:
    assert candidate.image is not None
    white = None if candidate.mask_image is None else is_white(candidate.mask_image, height, width)
    return model.read_picture(candidate.image.sized(height, width, model.resized_by), white)


def beginning(candidate: Candidate, read: EncodedImage | None, shape: Sequence[int], schedule: Schedule) -> Beginning:
    """What a candidate's row begins with, whose x has this shape and goes through this schedule.

    What goes on from another run draws no noise but that of its steps. Else blocks of its seed's noise are drawn in the
    order in which diffusers draws them from one generator: for the picture, where anything reads it; the start; for the
    masked picture. Where the autoencoder is sure, the start alone is drawn.
    """
    if read is None:
        return Beginning(start=first_noise(candidate, shape))
    if candidate.settings.denoising_start:
        return Beginning(drawn=-1, start=torch.zeros(*shape), origin=read.image.mean * schedule.resumed_scale)
    has_mask, from_image = read.is_painted is not None, candidate.settings.strength < 1
    reads_image, is_sure = from_image or not has_mask or read.is_held, read.image.deviation is None
    at = int(reads_image and not is_sure)  # the start's block
    seed = candidate.first_seed

    def drawn(posterior: Posterior, block: int) -> Tensor:
        if posterior.deviation is None:
            return posterior.mean
        fresh = noise([seed], STAGE, block, shape)[0].to(posterior.mean.device)
        return posterior.mean + posterior.deviation * fresh

    known = drawn(read.image, 0) if reads_image else None
    known_region = concat_channels = None
    if read.is_painted is not None and read.is_held:
        assert known is not None
        known_region = KnownRegion(known, read.is_painted)
    if read.beside is not None:
        masked, mask = drawn(read.beside.masked, at + 1), read.beside.mask
        concat_channels = torch.cat([mask, masked] if read.beside.mask_first else [masked, mask])
    return Beginning(
        drawn=0 if is_sure else at + has_mask,
        start=first_noise(candidate, shape, at),
        origin=known if from_image or not has_mask else None,
        known_region=known_region,
        concat_channels=concat_channels,
    )


def first_noise(candidate: Candidate, shape: Sequence[int], block: int = 0) -> Tensor | None:
    """Unit noise that a candidate's decoder begins with, of this block; None: block 0 of its own seed's."""
    if not candidate.noise_path:
        if candidate.latents is None and block:
            return noise([candidate.seed], STAGE, block, shape)[0]
        return candidate.latents
    seeds = [*(segment.seed for segment in candidate.noise_path), candidate.seed]
    x = noise(seeds[:1], STAGE, block, shape)[0]
    for segment, seed in zip(candidate.noise_path, seeds[1:], strict=True):
        if segment.steps == 0:
            x = turned(x, noise([seed], STAGE, block, shape)[0], segment.share)
    return x


def turned(x: Tensor, fresh: Tensor, share: float) -> Tensor:
    """Unit noise that is `share` fresh."""
    return (1 - share**2) ** 0.5 * x + share * fresh
