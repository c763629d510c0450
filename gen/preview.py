"""A cheap look at latents: one linear map from a cell and its neighbours to the cell's own pixels.

A search scores clean estimates long before a picture is finished, and the autoencoder is far too dear for that. Here
a latent cell with its eight neighbours becomes the cell's patch of factor x factor pixels: one 3x3 convolution to
3 factor^2 channels and a pixel shuffle, less than a thousandth of an autoencoder's work. The map is fitted by least
squares to what the model's own autoencoder makes of dead leaves (Lee, Mumford & Huang 2001: overlapping discs and
boxes of all sizes, whose statistics are those of natural pictures), so it needs no data and no file and fits every
family. It loses what the autoencoder's nonlinear layers add: fine texture, crisp edges, and with an autoencoder of
one narrow domain nearly all. Such are small, and up to `SMALL` pixels a search looks through the autoencoder itself.
It knows no diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 128 * 128  # pixels of a picture that costs its autoencoder less than the UNet a step (shapes64: 37 ms to 60)
SEED = 20011  # of the dead leaves
CELLS = 8192  # latent cells that are fitted to, at least; the map has 9 C + 1 numbers for each output
CHUNK = 16  # pictures that go through the autoencoder at once, at most
LEAVES = 60  # of a picture
RIDGE = 1e-4  # of the inputs' mean square, for channels that the dead leaves leave still


@dataclass(frozen=True, eq=False)
class Preview:
    """A fitted map."""

    weight: Tensor  # (3 factor^2, C, 3, 3) float32
    bias: Tensor  # (3 factor^2,) float32
    factor: int  # pixels per latent cell, along each side

    @classmethod
    @torch.no_grad()
    def fit(cls, latents: Tensor, pixels: Tensor) -> Preview:
        """Least squares from latents (B, C, h, w) to pixels (B, 3, H, W) in [0, 1], solved in float64 on the CPU."""
        factor = pixels.shape[-1] // latents.shape[-1]
        channels = latents.shape[1]
        inputs = neighbours(latents.double().cpu())  # (B h w, 9 C)
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        patches = F.pixel_unshuffle(pixels.double().cpu(), factor)  # (B, 3 factor^2, h, w)
        outputs = patches.movedim(1, -1).flatten(0, -2)
        gram = inputs.T @ inputs
        ridge = torch.full((len(gram),), RIDGE * float(gram.diagonal()[:-1].mean()), dtype=gram.dtype)
        ridge[-1] = 0.0  # the bias is free
        solved = torch.linalg.solve(gram + ridge.diag(), inputs.T @ outputs)  # (9 C + 1, 3 factor^2)
        weight = solved[:-1].T.reshape(-1, channels, 3, 3).float()
        return cls(weight.to(latents.device), solved[-1].float().to(latents.device), factor)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W) float32 in [0, 1]."""
        padded = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self.weight, self.bias), self.factor).clamp(0, 1)


def neighbours(latents: Tensor) -> Tensor:
    """Each cell of (B, C, h, w) with the eight around it, the edge repeated: (B h w, 9 C)."""
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    return F.unfold(padded, 3).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def fitted(
    encode: Callable[[Tensor], Tensor],  # pixels (B, 3, H, W) in [0, 1] to latents
    decode: Callable[[Tensor], Tensor],  # latents to pixels
    height: int,
    width: int,
    factor: int,
    device: torch.device,
) -> Preview:
    """The map that says best what an autoencoder makes of dead leaves of this size, in pixels."""
    number = ceil(CELLS / (height // factor * (width // factor)))
    pictures = dead_leaves(number, height, width)
    latents = torch.cat([encode(chunk.to(device)) for chunk in pictures.split(CHUNK)]).float()
    pixels = torch.cat([decode(chunk) for chunk in latents.split(CHUNK)])
    return Preview.fit(latents, pixels)


def dead_leaves(number: int, height: int, width: int) -> Tensor:
    """Pictures (number, 3, H, W) in [0, 1] of discs and boxes that lie over each other, always the same ones.

    Sizes follow a power law of exponent -3, as the leaves of Lee et al. do, from 1/16 of the shorter side up.
    """
    rng = torch.Generator("cpu").manual_seed(SEED)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    side = min(height, width)
    low, high = side / 16, side / 2
    pictures = []
    for _ in range(number):
        picture = torch.rand(3, 1, 1, generator=rng).expand(3, height, width).clone()
        for _ in range(LEAVES):
            u, y, x, tall, box = torch.rand(5, generator=rng).tolist()
            radius = (low**-2 - u * (low**-2 - high**-2)) ** -0.5
            down, across = (rows - y * height) / radius, (columns - x * width) / (radius * (0.5 + tall))
            inside = torch.maximum(down.abs(), across.abs()) <= 1 if box < 0.5 else down**2 + across**2 <= 1
            picture = torch.where(inside, torch.rand(3, 1, 1, generator=rng), picture)
        pictures.append(picture)
    return torch.stack(pictures)
