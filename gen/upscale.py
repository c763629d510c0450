"""Super resolution: from a small picture to a large one, many candidates at once (Ramesh et al. 2022, section 2.1).

It is a diffusion over pixels and goes through the same loop over rows as the small pictures did. The network sees the
small picture, enlarged, beside x and is told nothing else, so there is no guidance. The last step is another network's.
It knows nothing of the decoder that painted the small picture.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from clip_core.device import weights_dtype
from gen.candidate import Candidate
from gen.conditioning import Condition, Conditions
from gen.dispatch import dispatched
from gen.row import Row
from gen.rows import Network
from gen.scheduler import NoiseLevels

STAGE: Final = "super_resolution"


@dataclass(frozen=True, eq=False)
class Upscaler:
    """A trained pair of networks: one for all steps but the last, and one for the last."""

    first: UNet2DModel
    last: UNet2DModel
    levels: NoiseLevels

    def rows(self, candidates: Sequence[Candidate], keys: Sequence[Hashable], small: Sequence[Tensor]) -> list[Row]:
        """The row of each candidate, by its key, from a small picture (C, h, w) in [-1, 1]."""
        rows = []
        for candidate, key, picture in zip(candidates, keys, small, strict=True):
            settings = candidate.settings
            seen = Condition(concat_channels=enlarged(picture, settings.height, settings.width).to(self.first.dtype))
            rows.append(
                Row(
                    key=key,
                    seed=candidate.seed,
                    shape=(len(picture), settings.height, settings.width),
                    schedule=self.levels.schedule(self.levels.sampler, settings.super_res_num_inference_steps),
                    sampler=self.levels.sampler,
                    prompt=seen,
                    last=Condition(concat_channels=seen.concat_channels, network="last"),
                    options=self.levels.options(self.levels.sampler),
                    start=candidate.super_res_latents,
                )
            )
        return rows

    def call(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """(M, C, H, W) noisy pictures -> the output of the network that each of them asks."""
        return dispatched({"own": as_network(self.first), "last": as_network(self.last)}, x, timestep, conditions)


def as_network(network: UNet2DModel) -> Network:
    """A network as rows ask it."""

    def call(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.concat_channels is not None, "it sees the small picture"
        seen = conditions.beside(x).to(weights_dtype(network))
        return network(seen, timestep, return_dict=False)[0]

    return call


def enlarged(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture (C, h, w) at another size, bicubic, as the networks were trained to see it: clipped to [-1, 1]."""
    clipped = picture.clamp(-1, 1)[None]
    return F.interpolate(clipped, (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
