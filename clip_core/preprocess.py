"""Pictures into what a CLIP image tower takes: resized, cropped, normalised.

Two paths that agree: `from_images` through Pillow, as CLIP was trained, and `from_pixels` on the device. The
second does Pillow's own 8-bit arithmetic (its Resample.c) with two matrix products, so a picture just painted
scores as its saved file will, and gradients still flow. Knows no model, only the numbers of its config file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_core.device import to_device
from clip_core.fit import check_sizes

CONFIG_NAME = "preprocessor_config.json"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Radford et al. 2021, released preprocessing
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# what transformers' SiglipImageProcessor takes where its file is silent
SIGLIP: Mapping[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": 0.5,
    "image_std": 0.5,
}
RESAMPLE = {
    "lanczos": 1,
    "bilinear": 2,
    "bicubic": 3,
    "box": 4,
}  # Pillow's numbers, as config files hold them
SUPPORT = {"lanczos": 3.0, "bilinear": 1.0, "bicubic": 2.0, "box": 0.5}  # half width of each filter in pixels
ROUND_CROP = "round_crop"  # our key beside transformers', which always cut; it reads past it
FIXED_POINT = 2**22  # Pillow's PRECISION_BITS: weights are rounded to 22 binary places


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the tower's input; sizes in pixels, (height, width)."""

    resize: int | tuple[int, int] | None = 224  # an int: the shorter side becomes it; a pair: exactly; None: as is
    crop: tuple[int, int] | None = (
        224,
        224,
    )  # the middle, padded with black where too small; None: all of it
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resample: str = "bicubic"
    round_crop: bool = False  # an odd margin is halved to even (torchvision), not cut (transformers)

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLE:
            raise ValueError(f"resample {self.resample!r} is unknown; choose from: {', '.join(sorted(RESAMPLE))}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Preprocess":
        """Read preprocessor_config.json; ValueError naming the file where it is missing or damaged."""
        path = Path(folder) / CONFIG_NAME
        nested = Path(folder) / "processor_config.json"  # where transformers 5 saves a whole processor
        if not path.is_file() and nested.is_file():
            path = nested
        if not path.is_file():
            raise ValueError(f"{path} is missing; it says how pictures are sized and normalised for this CLIP")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            check_sizes(config, "it")
            return cls.from_config(config.get("image_processor", config))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocess":
        """From the keys of transformers' CLIP and SigLIP image processors; what is absent has that class's default."""
        if str(config.get("image_processor_type", "")).startswith("Siglip"):
            config = {**SIGLIP, **config}
        if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ValueError("pixels are rescaled by another factor than 1/255, which is not supported")
        resize: int | tuple[int, int] | None = None
        if config.get("do_resize", True):
            size = config.get("size", {"shortest_edge": 224})
            if isinstance(size, Mapping) and {"height", "width"} <= set(size):
                resize = (int(size["height"]), int(size["width"]))
            elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
                resize = int(size["shortest_edge"])
            elif isinstance(size, int):
                resize = size
            else:
                raise ValueError(f"size {size!r} is not supported; give shortest_edge, or height and width")
        crop = None
        if config.get("do_center_crop", True):
            given = config.get("crop_size", 224)
            crop = (given, given) if isinstance(given, int) else (int(given["height"]), int(given["width"]))
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if config.get("do_normalize", True):
            mean = _channels(config.get("image_mean", OPENAI_MEAN))
            std = _channels(config.get("image_std", OPENAI_STD))
        number = config.get("resample", RESAMPLE["bicubic"])
        names = [name for name, value in RESAMPLE.items() if value == number]
        if not names:
            raise ValueError(f"resample {number!r} is not supported; give one of {RESAMPLE}")
        round_crop = config.get(ROUND_CROP, False) is True
        return cls(resize=resize, crop=crop, mean=mean, std=std, resample=names[0], round_crop=round_crop)

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> "Preprocess":
        """From open_clip's preprocess_cfg (size, mean, std, interpolation, resize_mode)."""
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        mode = config.get("resize_mode") or "shortest"
        if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
            raise ValueError(f"resize_mode {mode!r} to {height}x{width} is not supported; square shortest, or squash")
        return cls(
            resize=(height, width) if mode == "squash" else height,
            crop=None if mode == "squash" else (height, width),
            mean=_channels(config.get("mean") or OPENAI_MEAN),
            std=_channels(config.get("std") or OPENAI_STD),
            resample=config.get("interpolation") or "bicubic",
            round_crop=True,
        )

    def to_config(self) -> dict[str, Any]:
        """The keys of transformers' CLIPImageProcessor, for preprocessor_config.json, and ours where it has none."""
        size: dict[str, int] = {}
        if isinstance(self.resize, int):
            size = {"shortest_edge": self.resize}
        elif self.resize is not None:
            size = {"height": self.resize[0], "width": self.resize[1]}
        config: dict[str, Any] = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None,
            "do_center_crop": self.crop is not None,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": RESAMPLE[self.resample],
        }
        if size:
            config["size"] = size
        if self.crop is not None:
            config["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        if self.round_crop:
            config[ROUND_CROP] = True
        return config

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of the result where it does not depend on the picture, else None."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def with_size(self, size: int) -> "Preprocess":
        """The same for a tower that takes `size` x `size` pixels."""
        resize = (size, size) if isinstance(self.resize, tuple) else size
        return replace(self, resize=resize, crop=None if self.crop is None else (size, size))

    def from_images(self, images: Sequence[Image.Image]) -> Tensor:
        """The Pillow path: pictures of any mode and size -> (B, 3, H, W) float32, normalised, on the CPU."""
        rows = []
        for image in images:
            image = image.convert("RGB")
            height, width = self._resized(image.height, image.width)
            if (height, width) != (image.height, image.width):
                # one axis at a time, width first: as Pillow did before 13, which turns some shapes round
                method = Image.Resampling(RESAMPLE[self.resample])
                image = image.resize((width, image.height), method).resize((width, height), method)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W) uint8
            rows.append(self._cropped(pixels))
        return self._normalised(torch.stack(rows))

    def from_pixels(self, pixels: Tensor, *, rounded: bool = True) -> Tensor:
        """The tensor path: (B, 3, H, W) in [0, 1], any float type and device -> float32, normalised.

        Values are rounded to 8 bits where a saved picture's would be; gradients pass through the rounding. Without it
        the answer is continuous in the pixels, as who follows a gradient step by step needs.
        """
        whole = _round if rounded else _clipped
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            given = f"pixels are {pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"{given}; give floats in [0, 1] of shape (B, 3, H, W)")
        # products of 8-bit levels and 22-bit weights are exact in float64, which Apple's devices lack
        exact = torch.float32 if pixels.device.type == "mps" else torch.float64
        with torch.autocast(pixels.device.type, enabled=False):
            levels = whole(pixels.to(exact) * 255)
            height, width = self._resized(*pixels.shape[-2:])
            if width != levels.shape[-1]:
                weights = _weights(levels.shape[-1], width, self.resample, exact, pixels.device)
                levels = whole(levels @ weights.T / FIXED_POINT)  # (B, 3, H, width)
            if height != levels.shape[-2]:
                weights = _weights(levels.shape[-2], height, self.resample, exact, pixels.device)
                levels = whole(weights @ levels / FIXED_POINT)  # (B, 3, height, width)
            return self._normalised(self._cropped(levels))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        other = int(self.resize * long / short)
        return (self.resize, other) if height <= width else (other, self.resize)

    def _cropped(self, pixels: Tensor) -> Tensor:
        if self.crop is None:
            return pixels
        (height, width), (rows, columns) = self.crop, pixels.shape[-2:]
        down, right = max(height - rows, 0), max(width - columns, 0)
        if down or right:
            pixels = F.pad(pixels, (right // 2, (right + 1) // 2, down // 2, (down + 1) // 2))
        halve = round if self.round_crop else int
        top, left = halve((pixels.shape[-2] - height) / 2), halve((pixels.shape[-1] - width) / 2)
        return pixels[..., top : top + height, left : left + width]

    def _normalised(self, levels: Tensor) -> Tensor:
        levels = levels.float()
        mean, std = _moments(self.mean, self.std, levels.device)
        return (levels / 255).sub_(mean).div_(std)


@cache
@torch.inference_mode(False)  # a gradient may go through them later
def _moments(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) each, on the device."""
    both = to_device(torch.tensor([mean, std]).reshape(2, 3, 1, 1), device)
    return both[0], both[1]


def _channels(value: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


class _EightBit(torch.autograd.Function):
    """Round to whole levels in [0, 255]; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor) -> Tensor:
        return (levels + 0.5).floor_().clamp_(0, 255)  # Pillow's clip8

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


def _round(levels: Tensor) -> Tensor:
    rounded: Tensor = _EightBit.apply(levels)
    return rounded


def _clipped(levels: Tensor) -> Tensor:
    return levels.clamp(0, 255)


@lru_cache(maxsize=32)
def _weights(old: int, new: int, resample: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each of `new` pixels takes from each of `old`: (new, old) whole numbers, FIXED_POINT to the whole.

    Pillow's precompute_coeffs and normalize_coeffs_8bpc. Kept, since building it costs more than using it.
    """
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a gradient later
        scale = old / new
        stretch = max(scale, 1.0)  # shrinking widens the filter, which is what avoids aliasing
        support = SUPPORT[resample] * stretch
        centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
        first = (centre - support + 0.5).trunc().clamp(min=0)[:, None]
        last = (centre + support + 0.5).trunc().clamp(max=old)[:, None]
        place = torch.arange(old, dtype=torch.float64)[None, :]
        raw = _filter(resample, (place - centre[:, None] + 0.5) / stretch)
        raw = torch.where((place >= first) & (place < last), raw, torch.zeros_like(raw))
        fixed = raw / raw.sum(dim=1, keepdim=True) * FIXED_POINT
        return (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc().to(device=device, dtype=dtype)


def _filter(resample: str, x: Tensor) -> Tensor:
    if resample == "box":
        return ((x > -0.5) & (x <= 0.5)).to(x.dtype)
    x = x.abs()
    if resample == "bilinear":
        return (1 - x).clamp(min=0)
    if resample == "lanczos":
        return torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))
    a = -0.5  # Keys 1981; Pillow's value, where OpenCV has -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
