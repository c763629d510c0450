"""A picture handed in as the beginning of another: by us and by stock diffusers' img2img pipelines."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from gen import Request, TextToImage
from gen.candidate import Candidate
from gen.picture import largest_difference
from gen.resolve import resolve
from gen.scheduler import STOCK
from tests.pictures import SIZE, picture
from tests.stock import EIGHT_BIT_LEVEL, FEW, LATENTS, LONG, SEED, SHORT, apart, stock_of
from tests.tiny import ddim, make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("img2img")
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.8, 1.1, 0.9, 1.2]}
    return {
        "1": make_tiny_stable_diffusion(root / "1", scheduler=ddim()),
        "2": make_tiny_stable_diffusion(root / "2", version=2, scheduler=ddim()),
        "pndm": make_tiny_stable_diffusion(root / "pndm"),
        "xl": make_tiny_stable_diffusion_xl(root / "xl", vae=moments),
    }


def stock(folder: Path, kind: str) -> Any:
    if kind != "xl":
        return stock_of(StableDiffusionImg2ImgPipeline, folder)
    pipeline = stock_of(StableDiffusionXLImg2ImgPipeline, folder)
    pipeline.register_to_config(requires_aesthetics_score=False)  # the base's, as its own pipeline tells it
    return pipeline


def rngs(number: int) -> list[torch.Generator]:
    """One generator for each picture, from which stock draws its latents' noise, its start and every step."""
    return [torch.Generator().manual_seed(SEED + k) for k in range(number)]


def both(model: TextToImage, stock: Any, image: Image.Image, number: int = 1, **asked: Any) -> tuple[Any, Any]:
    """The same pictures by us and by stock."""
    asked = FEW | {"num_images_per_prompt": number} | asked
    theirs = dict(asked)
    theirs.pop("sampler", None)
    theirs = stock(SHORT, image=[image] * number, generator=rngs(number), **theirs).images
    return model(SHORT, image=image, seed=SEED, **asked).images, theirs


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.2])  # of 5 steps all, three and one
@pytest.mark.parametrize("kind", ["1", "2", "xl"])
def test_pictures_equal_stock(
    models: dict[str, TextToImage], folders: dict[str, Path], kind: str, strength: float
) -> None:
    other = stock(folders[kind], kind)
    asked = {"strength": strength, "negative_prompt": "blue"}
    ours, theirs = both(models[kind], other, picture(), 2, output_type="latent", **asked)
    assert apart(ours, theirs) <= LATENTS
    ours, theirs = both(models[kind], other, picture(), 2, output_type="pil", **asked)
    assert ours[0].size == theirs[0].size == SIZE[::-1]
    assert max(largest_difference(a, b) for a, b in zip(ours, theirs, strict=True)) <= EIGHT_BIT_LEVEL


# not lms, of which stock takes the weights of steps that it has not made
SOME = ["dpm_2_ancestral", "dpmpp_2m_sde", "dpmpp_2s", "euler", "euler_ancestral", "heun", "unipc", "deis"]


@pytest.mark.parametrize("sampler", SOME)
def test_every_kind_of_sampler_starts_late_as_stock_does(
    models: dict[str, TextToImage], folders: dict[str, Path], sampler: str
) -> None:
    """Of 17 steps ten, so that what goes by the number of steps (few of them or not) goes by all of them."""
    name, options = STOCK[sampler]
    other = stock(folders["1"], "1")
    other.scheduler = getattr(diffusers, name).from_config(other.scheduler.config, **options)
    asked = {"strength": 0.6, "num_inference_steps": 17, "sampler": sampler, "output_type": "latent"}
    ours, theirs = both(models["1"], other, picture(), **asked)
    assert apart(ours, theirs) <= LATENTS


def test_pndm_starts_late_with_its_own_second_level_twice(models: dict[str, TextToImage]) -> None:
    """Stock begins in the middle of PNDM's warm-up, and then asks one level below where its latents are."""
    levels = models["pndm"].model.levels
    whole, late = levels.schedule("pndm", 5), levels.schedule("pndm", 5, 2)
    assert late.num_steps == 4 and whole.num_steps == 6  # of three levels and of five the second twice
    assert late.sigmas.tolist() == [whole.sigmas[k].item() for k in (3, 4, 4, 5, 6)]
    assert levels.schedule("pndm", 5, 4).sigmas.tolist() == whole.sigmas[5:].tolist()


@pytest.mark.parametrize(("sampler", "steps", "distance"), [("pndm", 20, 0.06), ("pndm", 50, 0.02), ("lms", 20, 0.03)])
def test_where_stock_starts_late_in_another_way(
    models: dict[str, TextToImage], folders: dict[str, Path], sampler: str, steps: int, distance: float
) -> None:
    """At strength 0.6; what docs/differences.md says."""
    model, folder = ("pndm", "pndm") if sampler == "pndm" else ("1", "1")
    other = stock(folders[folder], folder)
    if sampler == "lms":
        other.scheduler = diffusers.LMSDiscreteScheduler.from_config(other.scheduler.config)
    asked = {"strength": 0.6, "num_inference_steps": steps, "sampler": sampler, "output_type": "latent"}
    assert apart(*both(models[model], other, picture(), **asked)) == pytest.approx(distance, rel=0.3)


def test_the_reference_can_fail(models: dict[str, TextToImage]) -> None:
    """The picture, its strength and the words all show."""
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "image": picture(), "strength": 0.6, **FEW}
    plain = models["1"](SHORT, **asked).images
    for prompt, other in ((LONG, {}), (SHORT, {"strength": 0.8}), (SHORT, {"image": picture(1)})):
        assert apart(models["1"](prompt, **(asked | other)).images, plain) > 1e-2


def test_the_default_strength_is_stocks(models: dict[str, TextToImage]) -> None:
    for kind, strength in (("1", 0.8), ("xl", 0.3)):
        record = models[kind](SHORT, image=picture(), seed=1, **(FEW | {"num_inference_steps": 4})).records[0]
        assert record["settings"]["strength"] == strength  # type: ignore[index, call-overload]


@pytest.mark.parametrize("size", [1, 3])
def test_a_picture_does_not_depend_on_its_batch(models: dict[str, TextToImage], size: int) -> None:
    """Beside rows from noise alone, of other strengths and with other pictures, by a sampler that draws noise."""
    asked: dict[str, Any] = {"sampler": "euler_ancestral", "output_type": "pt", "height": 64, "width": 64, **FEW}
    one = Request(prompt=SHORT, image=picture(), strength=0.6, seed=3, num_images_per_prompt=size, **asked)
    others = [
        Request(prompt=LONG, seed=9, **asked),
        Request(prompt=LONG, image=picture(1), strength=0.9, seed=9, **asked),
    ]
    together = models["1"].paint([others[0], one, others[1]])[1].images
    for k in range(size):
        alone = models["1"](SHORT, image=picture(), strength=0.6, seed=3 + k, **asked).images
        assert (together[k] - alone[0]).abs().max() <= 1 / 255


@pytest.mark.parametrize("search", ["halving", "draft", "feynman_kac", "zero_order"])
def test_searches_go_from_a_picture_too_and_their_records_repeat(
    tiny: TextToImage, tmp_path: Path, search: str
) -> None:
    path = tmp_path / "in.png"
    picture(size=(64, 64)).save(path)
    asked: dict[str, Any] = {"sampler": "ddpm", "num_inference_steps": 10, "strength": 0.6, "output_type": "pt"}
    result = tiny(SHORT, image=path, num_images_per_prompt=6, keep=2, search=search, seed=1, **asked)
    assert len(result.images) == 2
    for image, record in zip(result.images, result.records, strict=True):
        assert (tiny.repaint(record) - image).abs().max() <= 1 / 255


def test_a_record_finds_its_picture_again_or_says_why_not(tiny: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    picture(size=(64, 64)).save(path)
    result = tiny(SHORT, image=path, strength=0.5, seed=1, output_type="pt")
    source = result.records[0]["image"]
    pixels = np.asarray(picture(size=(64, 64))).transpose(2, 0, 1).tobytes()
    assert source == {"sha256": hashlib.sha256(b"torch.uint8 (3, 64, 64)\0" + pixels).hexdigest(), "path": str(path)}
    moved = path.rename(tmp_path / "moved.png")
    with pytest.raises(ValueError, match=r"in\.png does not exist"):
        tiny.repaint(result.records[0])
    assert torch.equal(tiny.repaint(result.records[0], [moved]), result.images[0])
    picture(1, (64, 64)).save(path)
    with pytest.raises(
        ValueError, match=r"the image '.*in.png' has changed since \(its pixels' sha256 was [0-9a-f]{12}\)"
    ):
        tiny.repaint(result.records[0])
    unnamed = tiny(SHORT, image=picture(size=(64, 64)), strength=0.5, seed=1, output_type="pt")
    assert torch.equal(unnamed.images, result.images) and unnamed.records[0]["image"] == {"sha256": source["sha256"]}
    with pytest.raises(ValueError, match=r"the record is damaged: its strength is 0\.5, and it names no image"):
        tiny.repaint({name: value for name, value in unnamed.records[0].items() if name != "image"})
    with pytest.raises(ValueError, match="the image was a picture that its record has no file of"):
        tiny.repaint(unnamed.records[0])
    assert torch.equal(tiny.repaint(unnamed.records[0], [moved]), result.images[0])


def test_a_picture_may_be_a_path_pillow_an_array_or_a_tensor(tiny: TextToImage, tmp_path: Path) -> None:
    image = picture(size=(64, 64))
    image.save(tmp_path / "in.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    asked: dict[str, Any] = {"strength": 0.5, "seed": 1, "output_type": "pt"}
    one = tiny(SHORT, image=image, **asked).images
    for same in (tmp_path / "in.png", str(tmp_path / "in.png"), array, tensor, tensor / 255, array / 255):
        assert (tiny(SHORT, image=same, **asked).images - one).abs().max() <= 1e-5
    other = picture(1, (64, 64))
    two = tiny([SHORT, LONG], image=[image, other], **asked).images
    assert (two - torch.cat([one, tiny(LONG, image=other, **asked).images])).abs().max() <= 1e-5
    stacked = tiny([SHORT, LONG], image=torch.stack([tensor, tensor]), **asked).images
    assert (stacked[:1] - one).abs().max() <= 1e-5


def test_a_photograph_is_turned_as_the_camera_was_held_and_resized_as_stock_does(
    models: dict[str, TextToImage], folders: dict[str, Path], tmp_path: Path
) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # orientation: a quarter to the right
    upright, path = picture(), tmp_path / "photo.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=tags)
    asked: dict[str, Any] = {"strength": 0.6, "seed": SEED, "output_type": "latent", **FEW}
    assert torch.equal(
        models["1"](SHORT, image=path, **asked).images, models["1"](SHORT, image=upright, **asked).images
    )
    ours = models["1"](SHORT, image=path, height=64, width=40, **asked).images
    resized = upright.resize((40, 64), Image.Resampling.LANCZOS)
    _, theirs = both(models["1"], stock(folders["1"], "1"), resized, strength=0.6, output_type="latent")
    assert apart(ours, theirs) <= LATENTS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strength": 0.5}, "strength was given without image; give the picture as well, or leave strength out"),
        ({"mask_image": picture()}, "mask_image was given without image"),
        ({"image": picture(), "strength": 0}, "strength=0 leaves none of 5 steps; give 0.2 or more, up to 1"),
        ({"image": picture(), "strength": 0.19}, "strength=0.19 leaves none of 5 steps; give 0.2 or more"),
        ({"image": picture(), "strength": 1.5}, "strength=1.5 is out of range; give a number from 0 to 1"),
        ({"image": picture(), "strength": "high"}, "strength='high' is of type str; give a number"),
        ({"image": "nowhere.png"}, "picture nowhere.png does not exist"),
        ({"image": __file__}, "picture .* cannot be read"),
        ({"image": 3}, "image is a int; give a file's path, a Pillow picture, an array or a tensor"),
        ({"image": torch.rand(4, 6, 10)}, re.escape("image has shape (4, 6, 10); a picture has (H, W, 3) of an array")),
        ({"image": torch.rand(3, 64, 64) * 2}, "image has numbers outside"),
        ({"image": np.full((64, 64, 3), 256)}, r"image has whole numbers outside \[0, 255\]; give 8 bits, or floats"),
        ({"image": torch.full((3, 64, 64), -1)}, r"image has whole numbers outside \[0, 255\]"),
        ({"image": np.full((64, 64, 3), "a")}, "image is an array of <U1; give 8 bits, or floats"),
        ({"image": [picture(), picture()]}, "image has 2 pictures for 1 prompt; give one, or one for each"),
        (
            {"image": picture(size=(50, 70))},
            "image is 70 x 50 pixels, .* give height=48 and width=64 to have it resized",
        ),
        ({"image": picture(), "height": 64}, "image is 80 x 48 pixels, and only one of height and width was given"),
        (
            {"prompt": [SHORT, SHORT], "image": [picture(), picture(size=(64, 64))]},
            "image holds pictures of 80 x 48 and 64 x 64 pixels; give height and width to have them resized",
        ),
        (
            {"image": torch.rand(3, 64, 64), "height": 48, "width": 48},
            "image is 64 x 64 pixels, to be painted at 48 x 48",
        ),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(tiny: TextToImage, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(Request(**({"prompt": SHORT, "num_inference_steps": 5} | asked)), tiny.model.abilities)
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_any_type_are_8_bits_or_black_and_white(tiny: TextToImage) -> None:
    def read(image: Any, mask: Any = None) -> Candidate:
        return resolve(Request(prompt=SHORT, image=image, mask_image=mask), tiny.model.abilities).candidates[0]

    pixels = np.asarray(picture(size=(64, 64)))
    wanted, tensor = read(pixels).image, torch.from_numpy(pixels.astype(np.int32)).movedim(-1, 0)
    for given in (pixels.astype(np.int64), pixels.astype(np.uint16), tensor):
        image = read(given).image
        assert image is not None and wanted is not None and image.sha256 == wanted.sha256
    white = np.zeros((64, 64), np.int64)
    white[:32] = 1
    mask = read(pixels, white).mask_image
    assert mask is not None and mask.pixels.max() == 1.0 and mask.pixels.dtype == torch.float32


def test_what_is_handed_in_is_copied(tiny: TextToImage) -> None:
    pixels, latents = torch.rand(3, 64, 64), torch.randn(1, 4, 8, 8)
    pixels_then, latents_then = pixels.clone(), latents.clone()
    (begun,) = resolve(Request(prompt=SHORT, image=pixels), tiny.model.abilities).candidates
    (noised,) = resolve(Request(prompt=SHORT, latents=latents), tiny.model.abilities).candidates
    pixels.zero_()
    latents.zero_()
    assert begun.image is not None and torch.equal(begun.image.pixels, pixels_then)
    assert noised.latents is not None and torch.equal(noised.latents, latents_then[0])


def test_a_model_that_cannot_begin_with_a_picture_says_so(tiny: TextToImage) -> None:
    abilities = replace(tiny.model.abilities, strength=None)
    with pytest.raises(ValueError, match="image was given, but this model cannot begin with a picture; leave it out"):
        resolve(Request(prompt=SHORT, image=picture()), abilities)
