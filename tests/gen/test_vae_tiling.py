"""Pictures that go through the autoencoder tile by tile: stock's pixels, on request, in the memory of a tile."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor

from gen import Request, TextToImage, command, room
from gen.families.autoencoder import KLModel, has_tiles
from gen.picture import largest_difference, read_png
from gen.resolve import resolve
from tests.pictures import mask, picture
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, SEED, SHORT, apart, edited, start, stock_of
from tests.tiny import ddim, make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl
from tests.tiny_karlo import make_tiny_karlo

TILE = 64  # pixels of the tiny autoencoders' tiles
SIZE = (104, 80)  # height and width of two tiles and a cell, and of one tile and two cells
FEW: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}
LARGE: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], **FEW}
REFUSED = "vae_tiling=True, but this model's pictures are not decoded in tiles; leave vae_tiling out"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiles")
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.8, 1.1, 0.9, 1.2]}
    return {
        "1": make_tiny_stable_diffusion(root / "1", scheduler=ddim()),
        "9": make_tiny_stable_diffusion(root / "9", scheduler=ddim(), inpaints=True),
        "xl": make_tiny_stable_diffusion_xl(root / "xl", vae=moments),
    }


def stock(kind: Any, folder: Path) -> Any:
    """Stock's pipeline, whose autoencoder goes tile by tile."""
    pipeline = stock_of(kind, folder)
    pipeline.vae.enable_tiling()
    return pipeline


def like(model: TextToImage, **options: Any) -> AutoencoderKL:
    """An autoencoder as the model's but for these options, drawn at random."""
    return AutoencoderKL(**(dict(model.model.parts()["vae"].config) | options)).eval()


def furthest(ours: list[Image.Image], theirs: list[Image.Image]) -> int:
    return max(largest_difference(a, b) for a, b in zip(ours, theirs, strict=True))


# --- the pixels are stock's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (40, 120)])  # and one that is less than a tile one way
@pytest.mark.parametrize(("name", "kind"), [("1", StableDiffusionPipeline), ("xl", StableDiffusionXLPipeline)])
def test_pictures_equal_stock(
    models: dict[str, TextToImage], folders: dict[str, Path], name: str, kind: Any, size: tuple[int, int]
) -> None:
    asked = LARGE | {"num_images_per_prompt": 2, "height": size[0], "width": size[1]}
    latents = start(1, 2, (size[0] // 8, size[1] // 8))
    theirs = stock(kind, folders[name])(SHORT, latents=latents, **asked).images
    assert furthest(models[name](SHORT, seed=SEED, vae_tiling=True, **asked).images, theirs) <= EIGHT_BIT_LEVEL
    assert (
        furthest(models[name](SHORT, seed=SEED, **asked).images, theirs) > 10 * EIGHT_BIT_LEVEL
    )  # or it would say nothing


def test_a_picture_no_larger_than_a_tile_has_the_same_bits(models: dict[str, TextToImage]) -> None:
    asked = FEW | {"height": TILE, "width": TILE - 8, "seed": SEED, "output_type": "pt"}
    whole, tiled = (models["1"](SHORT, vae_tiling=on, **asked).images for on in (False, True))
    assert torch.equal(whole, tiled)


def test_a_picture_handed_in_is_read_as_stock_reads_it(
    models: dict[str, TextToImage], folders: dict[str, Path]
) -> None:
    asked = FEW | {"image": picture(size=SIZE), "strength": 0.7}
    rng = torch.Generator().manual_seed(SEED)
    pipeline = stock(StableDiffusionImg2ImgPipeline, folders["1"])
    theirs = pipeline(SHORT, generator=rng, output_type="latent", **asked).images
    assert apart(models["1"](SHORT, seed=SEED, vae_tiling=True, output_type="latent", **asked).images, theirs) < LATENTS
    assert apart(models["1"](SHORT, seed=SEED, output_type="latent", **asked).images, theirs) > 10 * LATENTS
    shown = pipeline(SHORT, generator=rng.manual_seed(SEED), **asked).images
    assert furthest(models["1"](SHORT, seed=SEED, vae_tiling=True, **asked).images, shown) <= EIGHT_BIT_LEVEL


@pytest.mark.parametrize("name", ["1", "9"])  # a UNet for inpainting is told the masked picture's latents as well
def test_a_mask_and_its_picture_are_read_as_stock_reads_them(
    models: dict[str, TextToImage], folders: dict[str, Path], name: str
) -> None:
    asked = LARGE | {"image": picture(size=SIZE), "mask_image": mask(SIZE), "strength": 1.0, "output_type": "latent"}
    rng = torch.Generator().manual_seed(SEED)
    theirs = stock(StableDiffusionInpaintPipeline, folders[name])(SHORT, generator=rng, **asked).images
    assert apart(models[name](SHORT, seed=SEED, vae_tiling=True, **asked).images, theirs) < LATENTS
    assert apart(models[name](SHORT, seed=SEED, **asked).images, theirs) > 10 * LATENTS


# --- one request does not notice another -----------------------------------------------------------------------------


def test_requests_with_and_without_share_an_engine_and_get_their_own_pixels(models: dict[str, TextToImage]) -> None:
    model = models["1"]
    asked: dict[str, Any] = {"prompt": SHORT, "seed": SEED, "output_type": "pt", **LARGE}
    requests = [
        Request(num_images_per_prompt=2, **asked),
        Request(num_images_per_prompt=3, vae_tiling=True, **asked),
        Request(image=picture(size=SIZE), strength=0.7, vae_tiling=True, **asked),
        Request(image=picture(size=SIZE), strength=0.7, **asked),
    ]
    alone = [model.paint([request])[0].images for request in requests]
    with model.engine() as engine:
        together = [future.result().images for future in [engine.submit(request) for request in requests]]
    for ours, expected in zip(together, alone, strict=True):
        assert (ours - expected).abs().max() <= 1 / 255
    for one, other in ((0, 1), (2, 3)):
        assert (alone[one][0] - alone[other][0]).abs().max() > 10 / 255
    assert not model.model.parts()["vae"].use_tiling  # nothing is left switched


def test_what_is_measured_of_whole_pictures_says_nothing_of_tiles(tiny_folder: Path) -> None:
    """A search's looks at small pictures are decoded as their ends are, and are of the same bucket."""
    asked = LARGE | {"prompt": SHORT, "seed": 1, "num_images_per_prompt": 8, "keep": 2, "num_inference_steps": 10}
    stages = []
    for on in (True, False):
        model = TextToImage.from_pretrained(tiny_folder, device="cpu")
        result = model.paint([Request(search="halving", vae_tiling=on, **asked)])[0]
        assert result.account.decodes > 2  # it has looked
        stages.append({key[0] for key in model._buckets.known if "decode" in key[0] and key[0] != "decoder"})
    assert stages == [{"tiled decode"}, {"decode"}]


def test_clips_gradient_goes_through_the_tiles(tiny: TextToImage) -> None:
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "rerank": False, "prior": False, **FEW}
    for size, is_larger in ((SIZE, True), ((TILE, TILE), False)):
        sized = asked | {"height": size[0], "width": size[1]}
        steered = [tiny(SHORT, vae_tiling=on, clip_guidance_scale=0.5, **sized).images for on in (False, True)]
        assert (apart(*steered) > 1e-3) == is_larger
        plain = [tiny(SHORT, vae_tiling=on, **sized).images for on in (False, True)]
        assert torch.equal(*plain) and apart(steered[1], plain[1]) > 1e-3
    model = tiny.model
    assert isinstance(model, KLModel) and model.clip is not None
    x0, text = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8), model.clip.text(SHORT).embedding
    slopes = []
    for decode in (model.tiled.decode, model.decode):
        latents = x0.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.cosine_similarity(model.clip.image(decode(latents)), text).sum(), latents)
        slopes.append(slope)
    assert slopes[0].abs().min() > 0 and apart(*slopes) > 1e-3  # every cell counts, whichever tile it is of


# --- it is on record -------------------------------------------------------------------------------------------------


def test_the_record_has_it_and_is_followed(models: dict[str, TextToImage]) -> None:
    result = models["1"](SHORT, seed=SEED, vae_tiling=True, output_type="pt", **LARGE)
    record = json.loads(json.dumps(result.records[0]))
    assert record["settings"]["vae_tiling"] is True
    assert (models["1"].repaint(record) - result.images[0]).abs().max() <= 1 / 255
    for other in ({"vae_tiling": False}, {}):  # records of old have no such word
        settings = {name: value for name, value in record["settings"].items() if name != "vae_tiling"}
        changed = models["1"].repaint(record | {"settings": settings | other})
        assert (changed - result.images[0]).abs().max() > 10 / 255


def test_a_models_own_card_may_ask_for_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["1"], tmp_path / "model"))
    (folder / "unclip.json").write_text(json.dumps({"defaults": {"vae_tiling": True}}))
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert model(SHORT, seed=SEED, **LARGE).records[0]["settings"]["vae_tiling"] is True  # type: ignore[index, call-overload]
    assert model(SHORT, seed=SEED, vae_tiling=False, **LARGE).records[0]["settings"]["vae_tiling"] is False  # type: ignore[index, call-overload]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_models_without_tiles_refuse_it(kandinskys: dict[str, TextToImage], tmp_path: Path) -> None:
    karlo = TextToImage.from_pretrained(make_tiny_karlo(tmp_path / "karlo"), device="cpu")
    for model in (karlo, *kandinskys.values()):
        with pytest.raises(ValueError, match=REFUSED):
            model(SHORT, vae_tiling=True)
        assert resolve(Request(prompt=SHORT, vae_tiling=False), model.model.abilities)


@pytest.mark.parametrize("given", ["yes", 1, 0.0])
def test_it_is_true_or_false(models: dict[str, TextToImage], given: Any) -> None:
    with pytest.raises(ValueError, match=f"vae_tiling={given!r}; give True or False"):
        resolve(Request(prompt=SHORT, vae_tiling=given), models["1"].model.abilities)


@pytest.mark.parametrize("sample_size", [50, 8, [64, 48]])
def test_tiles_that_would_not_make_a_whole_picture_are_refused(
    folders: dict[str, Path], tmp_path: Path, sample_size: object
) -> None:
    folder = Path(shutil.copytree(folders["1"], tmp_path / "model"))
    edited(folder / "vae" / "config.json", sample_size=sample_size)
    model = TextToImage.from_pretrained(folder, device="cpu")
    with pytest.raises(ValueError, match=REFUSED):
        model(SHORT, vae_tiling=True, **LARGE)
    vae = model.model.parts()["vae"]
    try:  # what diffusers itself makes of them
        tiled = vae.tiled_decode(torch.zeros(1, 4, 20, 20)).sample.shape[2:]
    except (TypeError, ValueError):
        return
    assert tiled != (160, 160)


@pytest.mark.parametrize("sample_size", [32, 64, 96, 256, 512, 768, 1024])
def test_tiles_of_every_usual_size_make_a_whole_picture(models: dict[str, TextToImage], sample_size: int) -> None:
    assert has_tiles(like(models["1"], sample_size=sample_size), 8)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_less_is_held(models: dict[str, TextToImage]) -> None:
    model = models["1"].model
    assert isinstance(model, KLModel)

    sizes: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, answer: sizes.append(answer.numel()))
        for layer in model.vae.decoder.modules()
    ]
    with torch.no_grad():
        largest = []
        for decode, side in ((model.decode, 64), (model.tiled.decode, 320), (model.decode, 320)):
            decode(torch.zeros(1, 4, side // 8, side // 8))
            largest.append(max(sizes))
            sizes.clear()
    for hook in hooks:
        hook.remove()
    assert largest[0] == largest[1] == largest[2] / 25  # no layer says more than of a tile
    plain = replace(model.abilities.defaults, height=320, width=640)
    tiled = replace(plain, vae_tiling=True)
    channels, latent = model.vae.config.block_out_channels[0], model.held_at_once(plain, False)
    assert model.held_at_once(plain, True) == 2 * channels * 320 * 640
    assert model.held_at_once(tiled, True) == max(2 * channels * TILE * TILE, latent)
    narrow = replace(tiled, width=16)
    assert model.held_at_once(narrow, True) == 2 * channels * TILE * 16


def test_a_picture_without_room_is_told_of_tiles(models: dict[str, TextToImage], monkeypatch: Any) -> None:
    model = models["1"]
    settings = replace(model.model.abilities.defaults, height=320, width=640)
    whole, tiled = (
        4 * model.model.held_at_once(replace(settings, vae_tiling=on), True)  # type: ignore[attr-defined]
        for on in (False, True)
    )
    asked: dict[str, Any] = {"height": 320, "width": 640, "num_inference_steps": 1}
    free = [whole - 1]
    monkeypatch.setattr(room, "free_memory", lambda device: free[0])
    monkeypatch.setattr(room, "reserve", lambda: 0)
    with pytest.raises(ValueError, match=r"give a smaller one, or vae_tiling=True$"):
        model(SHORT, **asked)
    assert model(SHORT, vae_tiling=True, **asked).seeds
    free[0] = tiled - 1
    with pytest.raises(ValueError, match=r"give a smaller one$"):
        model(SHORT, vae_tiling=True, **asked)


def test_a_module_that_was_switched_by_hand_stays_so(folders: dict[str, Path]) -> None:
    """All its pictures go by tiles, as with stock, and as much room is asked for."""
    model = TextToImage.from_pretrained(folders["1"], device="cpu")
    plain = replace(model.model.abilities.defaults, height=320, width=640)
    wanted = model(SHORT, seed=SEED, vae_tiling=True, output_type="pt", **LARGE).images
    model.model.parts()["vae"].enable_tiling()
    assert torch.equal(model(SHORT, seed=SEED, output_type="pt", **LARGE).images, wanted)
    held = [model.model.held_at_once(replace(plain, vae_tiling=on), True) for on in (False, True)]  # type: ignore[attr-defined]
    assert held[0] == held[1]


# --- another runtime, and the command line -------------------------------------------------------------------------


def test_by_openvino_too(folders: dict[str, Path], models: dict[str, TextToImage]) -> None:
    """Tiles of an edge are of other shapes, each of which is compiled."""
    pytest.importorskip("openvino")
    fast = TextToImage.from_pretrained(folders["1"], runtime="openvino")
    asked = LARGE | {"seed": SEED, "num_images_per_prompt": 3, "output_type": "pt"}
    found = [model([SHORT, LONG], vae_tiling=True, **asked).images for model in (fast, models["1"])]
    assert isinstance(found[0], Tensor) and (found[0] - found[1]).abs().max() <= 1 / 255
    assert not torch.equal(*found)  # or torch itself has answered


def test_it_is_asked_for_on_the_command_line(
    tiny_folder: Path,
    kandinsky_folders: dict[str, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sized = ["generate", SHORT, "-n", "1", "--width", "80", "--height", "104", "--steps", "2", "--json"]
    read = []
    for name, more in (("tiled", ["--vae-tiling"]), ("whole", [])):
        asked = [*sized, "--model", str(tiny_folder), "--out", str(tmp_path / name), *more]
        assert command.main(asked) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["settings"]["vae_tiling"] is bool(more)
        path = printed["pictures"][0]["path"]
        read.append(read_png(Path(path))[0])
        assert command.main(["reproduce", path]) == 0
        capsys.readouterr()
    assert largest_difference(*read) > 10 * EIGHT_BIT_LEVEL
    other = str(kandinsky_folders["2.2"]["combined"])
    assert command.main([*sized, "--model", other, "--out", str(tmp_path / "no"), "--vae-tiling"]) == 2
    err = capsys.readouterr().err
    assert "--vae-tiling, but this model's pictures are not decoded in tiles; leave --vae-tiling out" in err
