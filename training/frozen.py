"""Trained parts that a later task reads and never changes: the CLIP and the autoencoder of a model in the making."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel

from clip_core.clip import CLIP
from gen.families.autoencoder import latent_moments, to_latents
from gen.part import load_part
from training.data.cache import encoded, weights_digest
from training.data.examples import DataError
from training.data.pictures import Pictures


def default_device() -> torch.device:
    """Where this process reads its data set before it trains there: its GPU, or the CPU where accelerate is told to."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> CLIP:
    """A trained CLIP, frozen, on a device.

    Raises ValueError when the folder holds none; the message names it.
    """
    clip = CLIP.from_pretrained(str(trained(folder)), device)
    transformers_model(clip)
    return clip


def transformers_model(clip: CLIP) -> CLIPModel:
    """The network of a CLIP that transformers loaded: the only kind that a diffusers folder can hold.

    Raises DataError for an open_clip model.
    """
    if not isinstance(clip.model, CLIPModel):
        raise DataError(f"a {type(clip.model).__name__} cannot be built upon; convert it (clip_core.convert) first")
    return clip.model


def load_vae(folder: str | Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """A trained autoencoder, frozen, on a device; raises as `load_clip` does."""
    vae = load_part(AutoencoderKL, trained(folder), device, torch.float32)
    assert isinstance(vae, AutoencoderKL)
    return vae


def image_embeddings(dataset: Pictures, clip: CLIP, folder: str | Path) -> Tensor:
    """CLIP image embeddings of a data set, (N, E), not normalised."""
    return encoded(dataset, Path(folder), lambda pixels: clip.image(pixels.to(clip.device).float() / 255))


def image_patches(dataset: Pictures, clip: CLIP, folder: str | Path) -> Tensor:
    """CLIP's patch tokens of a data set before the last layer, (N, P, D) float16.

    The last layer's are of no use: contrast reads the class token alone there.
    """
    vision = transformers_model(clip).vision_model

    def encode(pixels: Tensor) -> Tensor:
        values = clip.preprocess.from_pixels(pixels.to(clip.device).float() / 255)
        states = vision(pixel_values=values, output_hidden_states=True).hidden_states
        return states[-2][:, 1:].half()

    return encoded(dataset, Path(folder), encode, what="patches")


def latents(dataset: Pictures, vae: AutoencoderKL, folder: str | Path) -> Tensor:
    """Latents of a data set, (N, C, h, w), normed as the engine norms those that it decodes."""
    moments = latent_moments(vae)
    return encoded(dataset, Path(folder), lambda pixels: to_latents(vae, pixels.to(vae.device).float() / 255, moments))


def reads(dataset: Pictures, *folders: str | Path) -> str:
    """A digest of the pictures and captions of a data set and of the frozen networks in `folders`."""
    digests = [dataset.digest, *(weights_digest(Path(folder)) for folder in folders)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def trained(folder: str | Path, file: str = "config.json") -> Path:
    """The folder of a trained part, which is told by a file; DataError when it holds none."""
    path = Path(folder)
    if not (path / file).is_file():
        raise DataError(f"{path} holds no trained part (no {file}); train it first or name another folder")
    return path
