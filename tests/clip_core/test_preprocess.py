"""Preprocessing: both paths agree, and each equals the stock processor of transformers and of open_clip."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_core.preprocess import Preprocess

SIZES = [(64, 64), (48, 75), (131, 90), (224, 224), (33, 20), (67, 64)]  # (width, height)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Half noise, half flat with hard edges: what overshoots and what does not."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    levels[: height // 2, : width // 2] = (250, 250, 250)
    levels[: height // 2, width // 2 :] = (15, 220, 40)
    return Image.fromarray(levels)


def as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "box"])
def test_tensor_path_equals_pillow(size: tuple[int, int], resample: str) -> None:
    image = picture(*size)
    for preprocess in (
        Preprocess(resize=56, crop=(56, 56), resample=resample),
        Preprocess(resize=(40, 60), crop=None, resample=resample),
        Preprocess(resize=None, crop=(50, 50)),
        Preprocess(resize=100, crop=(90, 91), resample=resample),
    ):
        expected = preprocess.from_images([image])
        torch.testing.assert_close(preprocess.from_pixels(as_pixels(image)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_equals_stock_transformers(size: tuple[int, int], tmp_path: Path) -> None:
    options = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    CLIPImageProcessor(**options, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    ours = Preprocess.from_folder(tmp_path).from_images([picture(*size)])
    pillow = CLIPImageProcessorPil.from_pretrained(tmp_path)(picture(*size), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, pillow, atol=1e-5, rtol=0)
    # the default backend is torchvision's resize, within one 8-bit level of Pillow's
    stock = CLIPImageProcessor.from_pretrained(tmp_path)(picture(*size), return_tensors="pt").pixel_values
    assert (ours - stock).abs().max() < 1.01 / 255 / 0.2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_stock_open_clip(size: tuple[int, int], mode: str, interpolation: str) -> None:
    config = {"size": 56, "mean": (0.5, 0.4, 0.3), "interpolation": interpolation, "resize_mode": mode}
    stock = image_transform(56, False, mean=config["mean"], resize_mode=mode, interpolation=interpolation)
    ours = Preprocess.from_open_clip(config)
    image = picture(*size)
    # Pillow 13 shrinks the height first for some shapes; CLIPs were trained before it, width first
    if mode == "squash":
        image = image.resize((56, size[1]), 2 if interpolation == "bilinear" else 3)
    expected = stock(image)[None]
    torch.testing.assert_close(ours.from_images([picture(*size)]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.from_pixels(as_pixels(picture(*size))), expected, atol=1e-5, rtol=0)


def test_painted_floats_score_as_their_saved_file() -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    saved = [Image.fromarray((row.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for row in pixels]
    preprocess = Preprocess(resize=40, crop=(40, 40))
    torch.testing.assert_close(preprocess.from_pixels(pixels), preprocess.from_images(saved), atol=1e-5, rtol=0)
    outside = torch.tensor([-0.2, 1.3]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    none = Preprocess(resize=None, crop=None, mean=(0, 0, 0), std=(1, 1, 1))
    assert none.from_pixels(outside)[:, 0, 0, 0].tolist() == [0, 1]


def test_gradient_of_the_mean_is_even() -> None:
    pixels = torch.full((1, 3, 16, 16), 0.4, requires_grad=True)
    with torch.inference_mode():  # fills the weight cache; must not spoil what follows
        Preprocess(resize=8, crop=(8, 8)).from_pixels(pixels)
    Preprocess(resize=8, crop=(8, 8), std=(1, 1, 1)).from_pixels(pixels).mean().backward()
    assert pixels.grad is not None
    assert pixels.grad.sum().item() == pytest.approx(1, abs=1e-5) and pixels.grad.min() >= 0


def test_other_float_types_and_autocast() -> None:
    pixels = as_pixels(picture(64, 64))
    preprocess = Preprocess(resize=30, crop=(30, 30))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(preprocess.from_pixels(pixels), preprocess.from_images([picture(64, 64)]))
    assert torch.equal(preprocess.from_pixels(pixels.half()), preprocess.from_pixels(pixels))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 30, "crop_size": 28, "resample": 2},  # as the oldest folders have it
        {"size": {"height": 20, "width": 24}, "do_center_crop": False, "image_mean": 0.5, "image_std": 0.25},
        {"do_resize": False, "do_normalize": False, "crop_size": {"height": 8, "width": 9}},
    ],
)
def test_config_goes_round(config: dict) -> None:
    preprocess = Preprocess.from_config(config)
    again = Preprocess.from_config(json.loads(json.dumps(preprocess.to_config())))
    assert again == preprocess
    expected = CLIPImageProcessorPil(**preprocess.to_config())(picture(70, 60), return_tensors="pt").pixel_values
    torch.testing.assert_close(preprocess.from_images([picture(70, 60)]), expected, atol=1e-5, rtol=0)


def test_what_open_clip_rounds_is_kept_in_a_folder() -> None:
    """Where a picture's margin is odd its crop is another one than transformers', by a pixel."""
    rounds = Preprocess.from_open_clip({"size": 16})
    again = Preprocess.from_config(json.loads(json.dumps(rounds.to_config())))
    assert again == rounds and again.round_crop
    wide = picture(23, 16)
    assert torch.equal(again.from_images([wide]), rounds.from_images([wide]))
    assert not torch.equal(replace(rounds, round_crop=False).from_images([wide]), rounds.from_images([wide]))
    assert "round_crop" not in Preprocess().to_config()


def test_gradients_go_through_numbers_made_while_painting() -> None:
    own = Preprocess(resize=8, crop=(8, 8), mean=(0.1, 0.2, 0.3))
    with torch.inference_mode():
        own.from_pixels(torch.rand(1, 3, 8, 8))
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    own.from_pixels(pixels).square().sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
        Preprocess.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged"):
        Preprocess.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 3}}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged: size"):
        Preprocess.from_folder(tmp_path)
    with pytest.raises(ValueError, match="1/255"):
        Preprocess.from_config({"do_rescale": False})
    with pytest.raises(ValueError, match="choose from: bicubic"):
        Preprocess(resample="cubic")
    with pytest.raises(ValueError, match="resize_mode 'longest'"):
        Preprocess.from_open_clip({"size": 8, "resize_mode": "longest"})
    for bad in (torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            Preprocess().from_pixels(bad)


def test_unrounded_pixels_are_continuous_and_close() -> None:
    """Half a level at most at each of three roundings; and a change too small for 8 bits is still seen."""
    preprocess = Preprocess().with_size(24)
    pixels = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    smooth, steps = (preprocess.from_pixels(pixels, rounded=rounded) for rounded in (False, True))
    level = 1 / (255 * min(preprocess.std))
    assert (smooth - steps).abs().max() < 2.5 * level and not torch.equal(smooth, steps)
    nudged = (pixels * (1 - 1e-5)).clamp(0, 1)
    assert 0 < (preprocess.from_pixels(nudged, rounded=False) - smooth).abs().max() < 0.01 * level
