"""Pictures that a user hands in: read, checked, known again by what they show, and brought to a size.

A `Source` is such a picture, or a mask, whatever it was given as: a file's path, a Pillow picture, an array or a
tensor. It knows files and pixels; what is made of them is `gen.edit`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gen.checks import count_of
from gen.picture import read_picture
from gen.settings import JSON

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A file's path, a Pillow picture, an array (H, W, 3) or a tensor (3, H, W), of 8 bits or floats in [0, 1].

Whole numbers of other types are taken for 8 bits, and where none is above 1, for black and white.

A mask is (H, W) or has one channel, and is white where the picture is to be painted anew."""

WHITE = 255  # of 8 bits
HALF = 0.5  # a mask is white from here on
RGB, GREY = 3, 1  # channels of a picture, and of a mask


@dataclass(frozen=True)
class Filter:
    """How Pillow brings a picture to another size."""

    kind: Image.Resampling
    reducing_gap: float | None = None  # first to this many times the size, at least, by plain means; None: at once


LANCZOS = Filter(Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class Source:
    """A picture handed in."""

    pixels: Tensor  # (3, H, W), or (1, H, W) of a mask; uint8, or float32 in [0, 1]
    path: str = ""  # of the file it came from; empty: it came from none

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @cached_property
    def sha256(self) -> str:
        """Of its pixels, whichever file holds them."""
        layout = f"{self.pixels.dtype} {tuple(self.pixels.shape)}\0".encode()
        return hashlib.sha256(layout + self.pixels.contiguous().numpy().tobytes()).hexdigest()

    def sized(self, height: int, width: int, by: Filter = LANCZOS) -> Tensor:
        """Pixels (C, height, width) float32 in [0, 1]."""
        pixels = self.pixels
        if self.size != (height, width):
            assert pixels.dtype == torch.uint8, "floats of another size are refused"
            array = pixels.permute(1, 2, 0).squeeze(-1).numpy()
            resized = Image.fromarray(array).resize((width, height), by.kind, reducing_gap=by.reducing_gap)
            pixels = as_tensor(np.asarray(resized))
        return pixels / 255 if pixels.dtype == torch.uint8 else pixels

    def to_json(self) -> JSON:
        """How it is found again: by its hash, and its path where it has one."""
        record: dict[str, JSON] = {"sha256": self.sha256}
        return record | ({"path": self.path} if self.path else {})


def found(name: str, record: object, given: Sequence[Source], channels: int = RGB) -> Source:
    """The source that a record names: among those given, else at its path; ValueError where it is not as it was."""
    if not isinstance(record, Mapping) or not isinstance(sha256 := record.get("sha256"), str):
        raise ValueError(f"the record is damaged: its {name} is {record!r}")
    path = record.get("path")
    for one in given:
        if len(one.pixels) < channels:
            continue  # a mask is no picture
        seen = one if len(one.pixels) == channels else greyed(one)
        if seen.sha256 == sha256:
            return seen
    if not isinstance(path, str):
        missing = f"a picture that its record has no file of (sha256 {sha256[:12]})"
        raise ValueError(f"the {name} was {missing}; give that picture with image=")
    there = source(name, path, channels)
    if there.sha256 != sha256:
        problem = f"the {name} '{path}' has changed since (its pixels' sha256 was {sha256[:12]})"
        raise ValueError(f"{problem}; give it as it was with image=")
    return there


def sources(name: str, given: object, number: int, channels: int = RGB) -> tuple[Source | None, ...]:
    """A picture for each of so many prompts, from one for all, one for each or None; else ValueError."""
    if given is None:
        return (None,) * number
    if is_batch(given):
        each = list(given)  # type: ignore[call-overload]
        if len(each) != number:
            problem = f"{name} has {count_of(len(each), 'picture')} for {count_of(number, 'prompt')}"
            raise ValueError(f"{problem}; give one, or one for each")
        return tuple(source(name, one, channels) for one in each)
    return (source(name, given, channels),) * number


def num_of(given: object) -> int:
    """How many pictures a user gave: one, or a list of them."""
    return len(given) if is_batch(given) else 1  # type: ignore[arg-type]


def is_batch(given: object) -> bool:
    """Whether these are pictures, and not one."""
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim == 4
    return isinstance(given, Sequence) and not isinstance(given, str)


def either(name: str, given: object) -> Source:
    """One picture, or a mask where an array or a tensor has the shape of one; ValueError where it cannot be read."""
    if not isinstance(given, Tensor | np.ndarray):
        return source(name, given)
    channels = 0 if isinstance(given, Tensor) else 2  # their axis
    is_mask = given.ndim == 2 or (given.ndim == 3 and given.shape[channels] == GREY)
    return source(name, given, GREY if is_mask else RGB)


def source(name: str, given: object, channels: int = RGB) -> Source:
    """One picture or mask; ValueError where it cannot be read."""
    kind = "picture" if channels == RGB else "mask"
    if isinstance(given, str | Path):
        return with_channels(read_picture(Path(given)), channels, str(given))
    if isinstance(given, Image.Image):
        return with_channels(given, channels)
    if not isinstance(given, Tensor | np.ndarray):
        allowed = "a file's path, a Pillow picture, an array or a tensor"
        raise ValueError(f"{name} is a {type(given).__name__}; give {allowed}")
    try:
        pixels = as_tensor(given) if isinstance(given, np.ndarray) else given.detach().clone().cpu()
    except (TypeError, ValueError):  # torch's: numbers of kinds or byte orders that it does not have
        raise ValueError(f"{name} is an array of {given.dtype}; give 8 bits, or floats in [0, 1]") from None
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] != channels or not pixels.numel():
        wanted = "(H, W, 3) of an array, (3, H, W) of a tensor" if channels == RGB else "(H, W)"
        raise ValueError(f"{name} has shape {tuple(given.shape)}; a {kind} has {wanted}")
    if pixels.dtype == torch.uint8:
        return Source(pixels)
    if not (pixels.is_floating_point() or pixels.is_complex()):
        levels = pixels.long()
        if not bool(((levels >= 0) & (levels <= WHITE)).all()):
            raise ValueError(f"{name} has whole numbers outside [0, {WHITE}]; give 8 bits, or floats in [0, 1]")
        if bool((levels > 1).any()):
            return Source(levels.to(torch.uint8))
    pixels = pixels.float()
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(f"{name} has numbers outside [0, 1]; give floats in [0, 1], or 8 bits")
    return Source(pixels)


def size_of(image: Source, height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
    """What a picture is painted at: its own height and width (None: as it is), or those asked for."""
    if height is not None and width is not None:
        return height, width
    own, (rows, columns) = f"{image.size[1]} x {image.size[0]} pixels", image.size
    if height is not None or width is not None:
        raise ValueError(f"image is {own}, and only one of height and width was given; give both, or none")
    if rows % multiple or columns % multiple:
        fitting = f"height={max(rows // multiple, 1) * multiple} and width={max(columns // multiple, 1) * multiple}"
        raise ValueError(
            f"image is {own}, and this model paints multiples of {multiple}; give {fitting} to have it resized"
        )
    return rows, columns


def check_alike(images: Sequence[Source | None], height: int | None, width: int | None) -> None:
    """ValueError for pictures of different sizes where nobody said at which they are painted."""
    sizes = list(dict.fromkeys(one.size for one in images if one is not None))
    if len(sizes) > 1 and height is None and width is None:
        listed = " and ".join(f"{columns} x {rows}" for rows, columns in sizes[:2])
        raise ValueError(f"image holds pictures of {listed} pixels; give height and width to have them resized")


def check_sized(name: str, one: Source, height: int, width: int) -> None:
    """ValueError where a picture would have to be resized and is a tensor of floats, which is not done."""
    if one.size != (height, width) and one.pixels.is_floating_point():
        problem = f"{name} is {one.size[1]} x {one.size[0]} pixels, to be painted at {width} x {height}"
        raise ValueError(f"{problem}; give floats in that size, or 8 bits to have them resized")


def check_mask(mask: Source, image: Source, height: int, width: int, multiple: int) -> None:
    """ValueError for a mask of another size than its picture, and for one that leaves nothing to paint."""
    if mask.size != image.size:
        problem = f"mask_image is {mask.size[1]} x {mask.size[0]} pixels, and image {image.size[1]} x {image.size[0]}"
        raise ValueError(f"{problem}; give a mask of the picture's size")
    check_sized("mask_image", mask, height, width)
    if not bool(cells(is_white(mask, height, width), (height // multiple, width // multiple)).any()):
        raise ValueError("mask_image is black all over, so nothing would be painted; make white what is to be painted")


def is_white(mask: Source, height: int, width: int) -> Tensor:
    """Where a mask is white: (1, height, width) bool."""
    return mask.sized(height, width) >= HALF


def cells(white: Tensor, size: Sequence[int]) -> Tensor:
    """A mask (1, H, W) on latents of this size (h, w): (1, h, w) bool, the nearest pixel's, as in diffusers."""
    return F.interpolate(white[None].float(), size=tuple(size))[0].bool()


def with_channels(picture: Image.Image, channels: int, path: str = "") -> Source:
    """A Pillow picture as a source of these channels."""
    return Source(as_tensor(np.asarray(picture.convert("RGB" if channels == RGB else "L"))), path)


def greyed(one: Source) -> Source:
    """A picture read as a mask."""
    if one.pixels.dtype != torch.uint8:
        return one
    return with_channels(Image.fromarray(one.pixels.permute(1, 2, 0).numpy()), GREY, one.path)


def as_tensor(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) to (C, H, W), in memory of its own."""
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.copy()).movedim(-1, 0).contiguous()
