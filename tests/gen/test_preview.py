"""Previews: a linear map from latents to pixels, fitted to what an autoencoder makes of dead leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gen import TextToImage
from gen.preview import Preview, dead_leaves, fitted


def psnr(ours: Tensor, theirs: Tensor) -> float:
    return float(-10 * (ours - theirs).square().mean().log10())


def test_a_linear_decoder_is_found_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, bias = 0.03 * torch.randn(12, 4, 3, 3, generator=rng), torch.full((12,), 0.5)
    latents = torch.randn(6, 4, 8, 8, generator=rng)

    def decode(z: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), weight, bias), 2)

    look = Preview.fit(latents, decode(latents))
    assert look.factor == 2
    other = torch.randn(2, 4, 8, 5, generator=rng)
    assert torch.allclose(look(other), decode(other).clamp(0, 1), atol=1e-3)
    assert not torch.allclose(look(other), look(other.flip(-1)).flip(-1), atol=1e-2)


def test_it_says_more_than_one_colour_for_each_cell() -> None:
    """Of an autoencoder that keeps 2x2 averages of every 4x4 patch."""

    def encode(pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.avg_pool2d(pixels, 2), 2) - 0.5  # (B, 12, h, w)

    def decode(latents: Tensor) -> Tensor:
        return F.interpolate(F.pixel_shuffle(latents + 0.5, 2), scale_factor=2, mode="bilinear")

    look = fitted(encode, decode, 64, 64, 4, torch.device("cpu"))
    leaves = dead_leaves(80, 64, 64)[-4:]
    cells = F.interpolate(F.avg_pool2d(leaves, 4), scale_factor=4.0)
    made = decode(encode(leaves))
    assert psnr(look(encode(leaves)), made) > 40 > 25 > psnr(cells, made)


def test_a_channel_that_never_moves_does_no_harm() -> None:
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[:, 2] = 0
    pixels = F.interpolate(latents[:, :1].expand(-1, 3, -1, -1) * 0.1 + 0.5, scale_factor=2.0)
    look = Preview.fit(latents, pixels)
    assert torch.isfinite(look.weight).all() and psnr(look(latents), pixels) > 40


def test_dead_leaves_are_always_the_same_and_cover_everything() -> None:
    leaves = dead_leaves(3, 48, 64)
    assert leaves.shape == (3, 3, 48, 64) and torch.equal(leaves, dead_leaves(3, 48, 64))
    assert leaves.min() >= 0 and leaves.max() <= 1
    assert not torch.equal(leaves[0], leaves[1])
    assert all(len(picture.flatten(1).unique(dim=1).T) > 10 for picture in leaves)


@torch.no_grad()
def test_a_model_previews_pictures_of_any_size_better_than_gray(tiny: TextToImage) -> None:
    """A little better: random weights, whose autoencoder is far from linear."""
    model = tiny.model
    for height, width in ((64, 64), (136, 72)):
        latents = model.encode(dead_leaves(2, height, width))
        look, made = model.preview(latents), model.decode(latents)
        assert look.shape == made.shape == (2, 3, height, width)
        gray = made.mean((0, 2, 3), keepdim=True).expand_as(made)
        assert psnr(look, made) > psnr(gray, made)


@pytest.mark.parametrize(("side", "small"), [(64, True), (128, True), (136, False)])
def test_small_pictures_are_looked_at_through_the_autoencoder(tiny: TextToImage, side: int, small: bool) -> None:
    calls: list[int] = []
    hook = tiny.model.vae.decoder.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    asked = {"num_images_per_prompt": 3, "keep": 1, "seed": 1, "height": side, "width": side, "prior": False}
    tiny("a star", search="halving", output_type="pt", **asked)  # measures memory and fits the map
    calls.clear()
    account = tiny("a star", search="halving", output_type="pt", **asked).account
    hook.remove()
    assert sum(calls) == account.decodes and (account.previews == 0) == small
