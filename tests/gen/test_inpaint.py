"""A part of a picture painted anew: by us and by stock diffusers' inpainting pipelines."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)

from gen import Request, TextToImage
from gen.picture import largest_difference
from gen.resolve import resolve
from gen.scheduler import STOCK
from tests.pictures import SIZE, mask, picture
from tests.stock import EIGHT_BIT_LEVEL, FEW, LATENTS, LONG, SEED, SHORT, apart, stock_of
from tests.tiny import ddim, make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl

HEIGHT, WIDTH = SIZE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inpaint")
    return {
        "4": make_tiny_stable_diffusion(root / "4", scheduler=ddim()),
        "9": make_tiny_stable_diffusion(root / "9", scheduler=ddim(), inpaints=True),
        "xl": make_tiny_stable_diffusion_xl(root / "xl"),
        "xl9": make_tiny_stable_diffusion_xl(root / "xl9", inpaints=True),
        "refiner": make_tiny_stable_diffusion_xl(root / "refiner", refines=True),
    }


def stock(folder: Path, kind: str) -> Any:
    return stock_of(StableDiffusionInpaintPipeline if kind in ("4", "9") else StableDiffusionXLInpaintPipeline, folder)


def theirs(pipeline: Any, seed: int = SEED, **asked: Any) -> Any:
    """Stock's picture of one generator, from which it draws latents, start, masked latents and every step."""
    asked = FEW | {"image": picture(), "mask_image": mask(), "height": HEIGHT, "width": WIDTH} | asked
    return pipeline(SHORT, generator=torch.Generator().manual_seed(seed), **asked).images


def ours(model: TextToImage, **asked: Any) -> Any:
    return model(SHORT, **(FEW | {"image": picture(), "mask_image": mask(), "seed": SEED} | asked)).images


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.2])  # of 5 steps all, three and one
@pytest.mark.parametrize("kind", ["4", "9", "xl", "xl9", "refiner"])
def test_pictures_equal_stock(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str, strength: float
) -> None:
    asked: dict[str, Any] = {"strength": strength, "negative_prompt": "blue"}
    pipeline = stock(folders[kind], kind)
    painted = ours(models[kind], output_type="latent", num_images_per_prompt=2, **asked)
    for k in range(2):
        assert apart(painted[k : k + 1], theirs(pipeline, SEED + k, output_type="latent", **asked)) <= LATENTS
    same = zip(ours(models[kind], **asked), theirs(pipeline, **asked), strict=True)
    assert max(largest_difference(a, b) for a, b in same) <= EIGHT_BIT_LEVEL


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2s", "euler", "euler_ancestral", "heun", "unipc"])
@pytest.mark.parametrize("kind", ["4", "9", "xl9"])
def test_another_sampler_equals_stocks_class(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str, sampler: str
) -> None:
    name, options = STOCK[sampler]
    pipeline = stock(folders[kind], kind)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    for strength in (1.0, 0.6):
        asked: dict[str, Any] = {"strength": strength, "output_type": "latent"}
        assert apart(ours(models[kind], sampler=sampler, **asked), theirs(pipeline, **asked)) <= LATENTS


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(clip_sample=True, clip_sample_range=0.5), PNDMScheduler(skip_prk_steps=False, steps_offset=1)],
)
def test_options_are_read_as_stocks_inpainting_reads_them(scheduler: Any, tmp_path: Path) -> None:
    """It clips where the file says so, which text to image never does."""
    folder = make_tiny_stable_diffusion(tmp_path / "9", scheduler=scheduler, inpaints=True)
    painted = ours(TextToImage.from_pretrained(folder, device="cpu"), output_type="latent")
    assert apart(painted, theirs(stock(folder, "9"), output_type="latent")) <= LATENTS


def test_what_is_black_in_the_mask_stays(models: dict[str, TextToImage]) -> None:
    """Without a UNet for it: latents of the black cells are the picture's own to the bit, whatever the sampler."""
    for sampler in ("ddim", "dpm_2_ancestral", "heun"):
        a, b = (
            ours(models["4"], sampler=sampler, strength=strength, output_type="latent", guidance_rescale=0.5)
            for strength in (1.0, 0.4)
        )
        same = (a == b).all(dim=1)[0]
        white = torch.zeros(HEIGHT // 8, WIDTH // 8, dtype=torch.bool)
        white[2:6, 3:8] = True  # the first pixel of each cell decides
        assert torch.equal(same, ~white)


def test_the_reference_can_fail(models: dict[str, TextToImage]) -> None:
    for kind in ("4", "9"):
        plain = ours(models[kind], output_type="latent")
        for other in ({"image": picture(1)}, {"mask_image": mask(box=(0, 0, 30, 30))}, {"strength": 0.6}):
            assert apart(ours(models[kind], output_type="latent", **other), plain) > 1e-2


def test_a_picture_does_not_depend_on_its_batch(models: dict[str, TextToImage]) -> None:
    for kind in ("4", "9"):
        asked: dict[str, Any] = {"sampler": "euler_ancestral", "output_type": "pt", **FEW}
        edits = [
            Request(prompt=SHORT, image=picture(), mask_image=mask(), seed=1, **asked),
            Request(prompt=LONG, image=picture(1), mask_image=mask(box=(0, 0, 30, 30)), strength=0.6, seed=2, **asked),
        ]
        others = [] if kind == "9" else [Request(prompt=LONG, seed=2, height=HEIGHT, width=WIDTH, **asked)]
        together = models[kind].paint([*others, *edits])[len(others) :]
        for edit, result in zip(edits, together, strict=True):
            alone = models[kind].paint([edit])[0].images
            assert (alone - result.images).abs().max() <= 1 / 255  # type: ignore[union-attr]


def test_a_record_repeats_picture_and_mask(models: dict[str, TextToImage], tmp_path: Path) -> None:
    paths = [tmp_path / "in.png", tmp_path / "mask.png"]
    picture().save(paths[0])
    mask().convert("RGB").save(paths[1])
    for kind in ("4", "9"):
        result = models[kind](SHORT, image=paths[0], mask_image=paths[1], seed=1, output_type="pt", **FEW)
        assert torch.equal(result.images, ours(models[kind], seed=1, output_type="pt"))
        assert torch.equal(models[kind].repaint(result.records[0]), result.images[0])
        assert torch.equal(models[kind].repaint(json.loads(json.dumps(result.records[0])), paths), result.images[0])
    arrays = [np.asarray(picture()), np.asarray(mask()) / 255]
    tensors = [torch.from_numpy(arrays[0].copy()).movedim(-1, 0), torch.from_numpy(arrays[1])[None]]
    for given in (arrays, tensors):
        (record,) = models["9"](SHORT, image=given[0], mask_image=given[1], seed=1, output_type="pt", **FEW).records
        for order in (given, given[::-1]):
            assert torch.equal(models["9"].repaint(record, order), result.images[0])
    mask(box=(0, 0, 30, 30)).save(paths[1])
    with pytest.raises(ValueError, match=r"the mask_image '.*mask\.png' has changed since"):
        models["9"].repaint(result.records[0])


@pytest.mark.parametrize("kind", ["9", "xl9"])
def test_what_is_not_said_is_as_stock_has_it(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str
) -> None:
    (one,) = resolve(Request(prompt=SHORT, image=picture(), mask_image=mask()), models[kind].model.abilities).candidates
    parameters = inspect.signature(type(stock(folders[kind], kind)).__call__).parameters
    for name in ("strength", "guidance_scale", "num_inference_steps"):
        assert getattr(one.settings, name) == parameters[name].default, name


@pytest.mark.parametrize("kind", ["9", "xl9"])
def test_what_we_save_stock_paints_the_same(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    folder = models[kind].save(tmp_path / "saved")
    index, theirs_index = (json.loads((each / "model_index.json").read_text()) for each in (folder, folders[kind]))
    assert index["_class_name"] == theirs_index["_class_name"] and index["_class_name"].endswith("InpaintPipeline")
    assert kind == "9" or index == theirs_index
    pipeline = stock(folder, kind)
    assert apart(ours(models[kind], output_type="latent"), theirs(pipeline, output_type="latent")) <= LATENTS


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("4", {"image": picture(), "mask_image": mask((64, 64))}, "mask_image is 64 x 64 pixels, and image 80 x 48"),
        ("4", {"image": picture(), "mask_image": mask(box=(0, 0, 0, 0))}, "mask_image is black all over"),
        ("4", {"image": picture(), "mask_image": mask(box=(1, 1, 3, 3))}, "mask_image is black all over"),
        ("4", {"image": picture(), "mask_image": "nowhere.png"}, "picture nowhere.png does not exist"),
        ("4", {"image": picture(), "mask_image": torch.rand(3, 48, 80)}, "a mask has"),
        ("4", {"mask_image": mask()}, "mask_image was given without image"),
        ("9", {}, "this model paints a part of a picture anew and does nothing else; give image and mask_image"),
        ("9", {"image": picture()}, "does nothing else; give image and mask_image"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(
    models: dict[str, TextToImage], kind: str, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(Request(prompt=SHORT, **asked), models[kind].model.abilities)
    assert "\n" not in str(caught.value)
