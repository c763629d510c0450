"""One picture to paint, and how a record holds it.

Owns: `Candidate`, all that a picture's pixels depend on but the model, its JSON both ways, and what a picture handed in
asks of a model. It knows no network.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen.checks import finite_float, integer
from gen.settings import JSON, Abilities, Settings
from gen.settings_checks import check_settings
from gen.source import GREY, RGB, Source, found

TENSORS = (
    "latents",
    "prior_latents",
    "super_res_latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "image_embeds",
    "negative_image_embeds",
)
SHOWN = "ip_adapter_image_embeds"  # a record holds it where it is a vector, and else names the picture
SHOWN_PICTURE = "ip_adapter_image"
PICTURES = {  # their channels
    "image": RGB,
    "mask_image": GREY,
    "variation_of": RGB,
    "interpolate_image": RGB,
    SHOWN_PICTURE: RGB,
}
MAX_SEED = 2**32 - 1  # torch's CPU generator reads 32 bits of a seed


@dataclass(frozen=True)
class NoiseSegment:
    """Whose noise a picture went by before the next seed's; a search that copies or turns rows makes such paths."""

    seed: int
    steps: int  # of the decoder that go by this seed's noise; 0: the start alone does, mixed with the next seed's
    share: float = 0.0  # of that mix which is the next seed's; 0 where steps is not

    @classmethod
    def from_json(cls, segment: object) -> NoiseSegment:
        """As a record has it; ValueError where it is damaged."""
        if not isinstance(segment, Mapping) or segment.keys() != {"seed", "steps", "share"}:
            raise ValueError(f"the record is damaged: its noise_path has {segment!r}")
        seed, steps = integer("seed", segment["seed"], 0, MAX_SEED), integer("steps", segment["steps"], 0)
        return cls(seed, steps, finite_float("share", segment["share"], 0.0, 1.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One picture to paint: all that its pixels depend on but the model."""

    prompt: str
    seed: int
    settings: Settings
    latents: Tensor | None = None  # (C, h, w) unit noise in place of the seed's
    prior_latents: Tensor | None = None  # (E,) unit noise in place of the seed's
    super_res_latents: Tensor | None = None  # (C, H, W) unit noise in place of the seed's
    prompt_embeds: Tensor | None = None  # (L, D) in place of the prompt's
    negative_prompt_embeds: Tensor | None = None  # (L, D) in place of the negative prompt's
    pooled_prompt_embeds: Tensor | None = None  # (P,) with prompt_embeds, where the UNet takes them pooled too
    negative_pooled_prompt_embeds: Tensor | None = None  # (P,)
    image_embeds: Tensor | None = None  # (E,) in place of the prior's answer
    image: Source | None = None  # the picture it begins with, noised as far as `strength` says
    image_latents: Tensor | None = None  # (C, h, w) in its place, or as noisy as `denoising_start` says
    mask_image: Source | None = None  # white where that is painted anew; None: everywhere
    variation_of: Source | None = None  # the picture whose embedding takes the place of the prior's answer
    interpolate_image: Source | None = None  # the picture towards whose embedding that goes
    ip_adapter_image: Source | None = None  # the picture that an IP-Adapter shows beside the text
    ip_adapter_image_embeds: Tensor | None = None  # (E,) or (S, E), what it reads of that; None: not yet, or no picture
    negative_image_embeds: Tensor | None = None  # (E,) in place of the null's
    noise_path: tuple[NoiseSegment, ...] = ()  # whose noise it went by before its own seed's; empty: its own throughout

    @property
    def first_seed(self) -> int:
        """The seed that its prior and the noise of its image embedding go by."""
        return self.noise_path[0].seed if self.noise_path else self.seed

    def to_json(self) -> dict[str, JSON]:
        """Prompt, seed and settings, and the names of tensors handed in, which JSON does not hold."""
        record: dict[str, JSON] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": self.settings.to_json(),
        }
        if self.noise_path:
            record["noise_path"] = [asdict(before) for before in self.noise_path]
        for name in PICTURES:
            if (source := getattr(self, name)) is not None:
                record[name] = source.to_json()
        given = [name for name in TENSORS if getattr(self, name) is not None]
        if (shown := self.ip_adapter_image_embeds) is not None:
            if shown.ndim == 1:
                record[SHOWN] = packed(shown)
                record.pop(SHOWN_PICTURE, None)
            elif self.ip_adapter_image is None:
                given.append(SHOWN)
        given += [] if self.image_latents is None else ["image"]
        if self.variation_of is not None:  # from which the embedding is made again
            given.remove("image_embeds")
        return record | ({"given": list(given)} if given else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any], abilities: Abilities, images: Sequence[Source] = ()) -> Candidate:
        """The candidate of a record, checked as a request is; ValueError says what the record lacks.

        The pictures it was painted from are looked for among `images`, and then where the record says.
        """
        if given := record.get("given"):
            raise ValueError(f"the picture was painted from tensors ({', '.join(given)}) that its record lacks")
        try:
            prompt, seed, settings_record = record["prompt"], record["seed"], record["settings"]
        except KeyError as error:
            raise ValueError(f"the record has no {error}; give one that a picture was saved with") from None
        if not isinstance(prompt, str) or not isinstance(settings_record, Mapping):
            raise ValueError("the record is damaged: its prompt is no text or its settings no object")
        # records of old have no vae_tiling, and knew none
        settings = replace(abilities.defaults, vae_tiling=False).updated(settings_record, "record")
        check_settings(settings, abilities)
        path = noise_path_of(record)
        shown = unpacked(record[SHOWN], abilities.ip_adapter_shape) if SHOWN in record else None
        pictures = {name: found(name, record[name], images, PICTURES[name]) for name in PICTURES if name in record}
        check_named(settings, pictures, abilities)
        return cls(
            prompt=prompt,
            seed=integer("seed", seed, 0, MAX_SEED),
            settings=settings,
            image=pictures.get("image"),
            mask_image=pictures.get("mask_image"),
            variation_of=pictures.get("variation_of"),
            interpolate_image=pictures.get("interpolate_image"),
            ip_adapter_image=pictures.get(SHOWN_PICTURE),
            ip_adapter_image_embeds=shown,
            noise_path=path,
        )


def noise_path_of(record: Mapping[str, Any]) -> tuple[NoiseSegment, ...]:
    """The `noise_path` of a record, empty where it has none; ValueError where it is damaged."""
    segments = record.get("noise_path", [])
    if not isinstance(segments, list):
        raise ValueError(f"the record is damaged: its noise_path is {segments!r}")
    return tuple(NoiseSegment.from_json(each) for each in segments)


def check_named(settings: Settings, pictures: Mapping[str, Source], abilities: Abilities) -> None:
    """Refuse (ValueError) pictures that the model cannot see, and settings of pictures that a record does not name."""
    if "variation_of" in pictures:
        check_seeing(settings, abilities)
    elif settings.edit_from or "interpolate_image" in pictures:
        raise ValueError("the record is damaged: it moves the embedding of a picture that it does not name")
    if SHOWN_PICTURE in pictures:
        check_shown(abilities)
    if settings.strength < 1 and "image" not in pictures:
        raise ValueError(f"the record is damaged: its strength is {settings.strength}, and it names no image")
    if settings.denoising_start:
        raise ValueError("the record is damaged: it goes on from latents and does not say that it lacks them")


def packed(embeds: Tensor) -> str:
    """An embedding as text: its float32 numbers in little-endian order, in base 64."""
    return base64.b64encode(embeds.float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpacked(encoded: object, shape: tuple[int, ...] | None) -> Tensor:
    """The embedding (E,) of a record; ValueError where it is damaged, or of another shape than is taken."""
    try:
        values = np.frombuffer(base64.b64decode(str(encoded), validate=True), "<f4")
    except ValueError:  # base 64's own, or bytes that are no whole numbers of floats
        raise ValueError(f"the record is damaged: its {SHOWN} is no embedding") from None
    if (len(values),) != shape:
        raise ValueError(
            f"the picture was painted with an IP-Adapter of shape {(len(values),)}; this model takes {shape}"
        )
    return torch.from_numpy(values.astype(np.float32))


def check_seeing(settings: Settings, abilities: Abilities) -> None:
    """Refuse a picture's embedding (ValueError) of a model that takes none, or has nothing to make it by."""
    if not abilities.can_see:
        problem = "takes no image embedding" if abilities.embedding_width is None else "has no CLIP for it"
        raise ValueError(f"variation_of was given, but this model {problem}; leave it out, or begin from it with image")
    if settings.edit_from and not abilities.can_compare:
        raise ValueError("edit_from compares texts by the CLIP whose embeddings the model takes; it has no such clip/")


def check_shown(abilities: Abilities) -> None:
    """Refuse a picture (ValueError) to a model that no IP-Adapter shows one, or that cannot embed it."""
    if abilities.ip_adapter_shape is None:
        raise ValueError(f"{SHOWN_PICTURE} was given, but this model has no IP-Adapter; load one with load_ip_adapter")
    if not abilities.ip_adapter_sees:
        raise ValueError(f"the IP-Adapter has no image encoder; load it with image_encoder=FOLDER, or give {SHOWN}")
