"""Pictures handed in to Kandinsky 2.2 and 2.1: by us and by diffusers' pipelines for them.

Stock is asked for every picture as for a prompt of its own: of several of one prompt it makes mistakes, which are told
below. Its 2.1 noises a picture to another level than the one it then steps from; `at_its_level` mends that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.kandinsky.pipeline_kandinsky_inpaint import prepare_mask
from PIL import Image
from torch import Tensor

from gen import Request, TextToImage
from gen.command import main
from gen.families.kandinsky import widened
from gen.picture import largest_difference
from gen.resolve import resolve
from gen.source import source
from tests.pictures import mask, picture
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, SEED, SHORT, apart, draws
from tests.stock_kandinsky import stock_of
from tests.tiny import WIDTH
from tests.tiny_kandinsky import BETAS, VERSIONS, make_tiny_kandinsky

Kind: TypeAlias = "tuple[str, bool]"
"""A version, and whether its UNet is for inpainting"""
Folders: TypeAlias = "dict[Kind, dict[str, Path]]"
Models: TypeAlias = "dict[Kind, TextToImage]"
Stocks: TypeAlias = "dict[Kind, Any]"

STEPS = {"num_inference_steps": 4}
FROM = {"2.2": "KandinskyV22Img2ImgPipeline", "2.1": "KandinskyImg2ImgPipeline"}
INPAINTS = {"2.2": "KandinskyV22InpaintPipeline", "2.1": "KandinskyInpaintPipeline"}
SIZE = (64, 128)  # height and width
CASES: list[tuple[int, dict[str, Any]]] = [  # pictures of a prompt, and how they are guided
    (1, {"guidance_scale": 1.0}),
    (3, {"guidance_scale": 1.0}),
    (1, {"guidance_scale": 4.0}),
    (3, {"guidance_scale": 4.0}),
    (4, {"guidance_scale": 3.0, "negative_prompt": "blue"}),
]
NAMES = ["unguided", "3-unguided", "guided", "3-guided", "4-negative"]


@pytest.fixture(scope="module")
def folders(kandinsky_folders: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("inpaint")
    made = {(version, True): make_tiny_kandinsky(root / version, version, inpaints=True) for version in VERSIONS}
    return made | {(version, False): of for version, of in kandinsky_folders.items()}


@pytest.fixture(scope="module")
def models(kandinskys: dict[str, TextToImage], folders: Folders) -> Models:
    made = {(version, False): model for version, model in kandinskys.items()}
    for version in VERSIONS:
        made[version, True] = TextToImage.from_pretrained(folders[version, True]["combined"], device="cpu")
    return made


@pytest.fixture(scope="module")
def stocks(folders: Folders) -> Stocks:
    loaded = {}
    for (version, inpaints), each in folders.items():
        kind = getattr(diffusers, (INPAINTS if inpaints else FROM)[version])
        loaded[version, inpaints] = kind.from_pretrained(each["decoder"])
        loaded[version, inpaints].set_progress_bar_config(disable=True)
    return loaded


def embeds(number: int = 1) -> dict[str, Tensor]:
    """What prompts look like, and what they are guided away from."""
    made = torch.randn(2, number, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"image_embeds": made[0], "negative_image_embeds": made[1]}


def theirs(pipeline: Any, number: int, prompts: Sequence[str] = (SHORT,), **asked: Any) -> tuple[Tensor, Any]:
    """Final latents, which 2.1 does not give by itself, and pictures; each as the only one of a prompt."""
    seeds = [SEED + k for _ in prompts for k in range(number)]
    last: dict[str, Tensor] = {}
    words: dict[str, Any] = embeds(len(prompts)) | asked
    each = ["image_embeds", "negative_image_embeds"]
    words |= {name: words[name].repeat_interleave(len(seeds) // len(words[name]), dim=0) for name in each}
    for name in ("image", "mask_image"):
        if name in words:
            words[name] = [words[name]] * len(seeds)
    negative = words.pop("negative_prompt", None)
    if "text_encoder" in pipeline.components:
        words["prompt"] = [prompt for prompt in prompts for _ in range(number)]
        words["negative_prompt"] = None if negative is None else [negative] * len(seeds)
    words |= {"callback": lambda step, timestep, latents: last.update(latents=latents), "callback_steps": 1}
    painted = pipeline(generator=draws("decoder", seeds), **(STEPS | words)).images
    return last["latents"], painted


def ours(model: TextToImage, number: int = 1, prompt: Any = SHORT, **asked: Any) -> Any:
    words: dict[str, Any] = {"num_images_per_prompt": number, "seed": SEED, "output_type": "latent", "rerank": False}
    return model(prompt, **(STEPS | words | embeds(1 if isinstance(prompt, str) else len(prompt)) | asked)).images


def assert_same(model: TextToImage, pipeline: Any, number: int, **asked: Any) -> None:
    latents, pictures = theirs(pipeline, number, **asked)
    if "text_encoder" not in pipeline.components:  # then nobody reads it; what it looks like is handed in
        asked.pop("negative_prompt", None)
    if asked["guidance_scale"] == 1:
        asked["negative_image_embeds"] = None
    painted = ours(model, number, **asked)
    assert apart(painted, latents) <= LATENTS
    again = ours(model, number, output_type="pil", **asked)
    assert len(again) == len(pictures) == number
    assert max(largest_difference(a, b) for a, b in zip(again, pictures, strict=True)) <= EIGHT_BIT_LEVEL


# --- image to image --------------------------------------------------------------------------------------------------


def square(strength: float) -> dict[str, Any]:
    return {"image": picture(size=(64, 64)), "height": 64, "width": 64, "strength": strength}


def at_its_level(pipeline: Any, monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    """2.1's pipeline with the noise of the level that it begins at."""
    if "text_encoder" in pipeline.components:
        scheduler, steps = pipeline.scheduler, STEPS["num_inference_steps"]

        def noised(x: Tensor, noise: Tensor, _: Tensor) -> Tensor:
            return scheduler.add_noise(x, noise, scheduler.timesteps[steps - int(steps * strength)].repeat(len(x)))

        monkeypatch.setattr(pipeline, "add_noise", noised)


@pytest.mark.parametrize(("number", "guided"), CASES, ids=NAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_pictures_from_one_equal_stock(
    models: Models, stocks: Stocks, version: str, number: int, guided: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    strength = {1: 1.0, 3: 0.6, 4: 0.3}[number]  # of 4 steps all, two and one
    at_its_level(stocks[version, False], monkeypatch, strength)
    assert_same(models[version, False], stocks[version, False], number, **square(strength), **guided)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_of_another_size_is_brought_there_as_stock_does(
    models: Models, stocks: Stocks, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bicubic, where other families go by Lanczos."""
    at_its_level(stocks[version, False], monkeypatch, 0.5)
    for size in ((150, 211), (40, 50)):
        asked = square(0.5) | {"image": picture(size=size), "guidance_scale": 4.0}
        assert_same(models[version, False], stocks[version, False], 1, **asked)


def test_another_sampler_starts_where_stocks_class_does(models: Models, stocks: Stocks) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading")
    other = type(stocks["2.2", False])(**{**stocks["2.2", False].components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    painted = ours(models["2.2", False], sampler="ddim", guidance_scale=4.0, **square(0.6))
    assert apart(painted, theirs(other, 1, guidance_scale=4.0, **square(0.6))[0]) <= LATENTS


@pytest.mark.parametrize("version", VERSIONS)
def test_words_and_the_prior_lead_a_picture_too(
    folders: Folders, models: Models, stocks: Stocks, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the words on, with a negative prompt, by the combined folder; and a strength of the model's own."""
    at_its_level(stocks[version, False], monkeypatch, 0.3)
    handed = stock_of(version, folders[version, False]).embeds([SHORT], 3, ["blue"], 4.0)  # with three steps
    asked: dict[str, Any] = {"image": square(0.3)["image"], "negative_prompt": "blue", "num_images_per_prompt": 3}
    asked |= {"seed": SEED, "output_type": "latent", "rerank": False, "prior_num_inference_steps": 3, **STEPS}
    result = models[version, False](SHORT, **asked)
    assert result.records[0]["settings"]["strength"] == 0.3
    words = {"image_embeds": handed[0], "negative_image_embeds": handed[1], "negative_prompt": "blue", **square(0.3)}
    assert apart(result.images, theirs(stocks[version, False], 3, guidance_scale=4.0, **words)[0]) <= LATENTS


def test_what_2_1_noises_a_picture_to_in_stock(models: Models, stocks: Stocks) -> None:
    """Betas up to 0.02 at another timestep, where it was trained with betas up to 0.012; see docs/differences.md."""
    for strength, distance in ((0.3, 0.15), (0.6, 0.075)):  # of the random weights that a version of transformers draws
        asked = square(strength) | {"guidance_scale": 4.0, "num_inference_steps": 20}
        painted = ours(models["2.1", False], **asked)
        assert apart(painted, theirs(stocks["2.1", False], 1, **asked)[0]) == pytest.approx(distance, abs=0.02)


def test_stocks_faults_with_a_picture(models: Models, stocks: Stocks) -> None:
    """It mixes up height and width: 2.2 paints what lies on its side, 2.1 nothing."""
    asked: dict[str, Any] = {"image": picture(size=SIZE), "strength": 0.5, "guidance_scale": 4.0}
    height, width = SIZE
    latents, _ = theirs(stocks["2.2", False], 1, height=height, width=width, **asked)
    assert latents.shape[2:] == (width // 8, height // 8)
    latents, _ = theirs(stocks["2.2", False], 1, height=width, width=height, **asked)
    assert apart(ours(models["2.2", False], **asked), latents) <= LATENTS
    with pytest.raises(ValueError, match="Unexpected latents shape"):
        theirs(stocks["2.1", False], 1, height=height, width=width, **asked)
    assert ours(models["2.1", False], **asked).shape == latents.shape


@pytest.mark.parametrize("version", VERSIONS)
def test_the_reference_can_fail(models: Models, version: str) -> None:
    """Picture, strength and words all show."""
    plain = ours(models[version, False], **square(0.5))
    others: list[dict[str, Any]] = [{"image": picture(1, (64, 64))}, {"strength": 0.75}, {"seed": 1}]
    others += [{name: -value} for name, value in embeds().items()]
    for other in others:
        assert apart(ours(models[version, False], **(square(0.5) | other)), plain) > 1e-2, other


# --- inpainting ------------------------------------------------------------------------------------------------------


def test_a_mask_is_widened_as_the_unets_were_shown_it() -> None:
    rng = torch.Generator().manual_seed(0)
    for share in (0.05, 0.3, 0.9):
        is_painted = torch.rand(4, 1, 7, 9, generator=rng) < share
        assert torch.equal(prepare_mask((~is_painted).float()), torch.stack([~widened(each) for each in is_painted]))


def part() -> dict[str, Any]:
    return {"image": picture(size=SIZE), "mask_image": mask(SIZE), "height": SIZE[0], "width": SIZE[1]}


@pytest.mark.parametrize(("number", "guided"), CASES, ids=NAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_inpainted_pictures_equal_stock(
    models: Models, stocks: Stocks, version: str, number: int, guided: dict[str, Any]
) -> None:
    assert_same(models[version, True], stocks[version, True], number, **part(), **guided)


@pytest.mark.parametrize("version", VERSIONS)
def test_picture_and_mask_of_another_size_are_brought_there_as_stock_does(
    models: Models, stocks: Stocks, version: str
) -> None:
    box = {"image": picture(size=(150, 211)), "mask_image": mask((150, 211), (20, 30, 100, 90))}
    assert_same(models[version, True], stocks[version, True], 1, **(part() | box), guidance_scale=4.0)


def test_stock_holds_the_first_picture_of_a_call(models: Models, stocks: Stocks) -> None:
    """2.2's blends the first picture, by the first mask, into all; ours each prompt's own into its own."""
    images, masks = [picture(k, SIZE) for k in range(2)], [mask(SIZE), mask(SIZE, (0, 0, 30, 30))]
    both = ours(models["2.2", True], prompt=[SHORT, LONG], image=images, mask_image=masks)
    last: dict[str, Tensor] = {}
    stocks["2.2", True](
        image=images,
        mask_image=masks,
        height=SIZE[0],
        width=SIZE[1],
        generator=draws("decoder", [SEED, SEED]),
        callback=lambda step, timestep, latents: last.update(latents=latents),
        callback_steps=1,
        **STEPS,
        **embeds(2),
    )
    assert apart(both[:1], last["latents"][:1]) <= LATENTS
    assert apart(both[1:], last["latents"][1:]) > 1e-2
    asked = {name: value[1:] for name, value in embeds(2).items()}
    alone, _ = theirs(stocks["2.2", True], 1, image=images[1], mask_image=masks[1], height=64, width=128, **asked)
    assert apart(both[1:], alone) <= LATENTS


def test_the_combined_pipeline_hands_pictures_over_in_another_order(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings lie prompt by prompt; ours are paired, as the test of several pictures shows."""
    both = diffusers.KandinskyV22InpaintCombinedPipeline.from_pretrained(folders["2.2", True]["combined"])
    both.set_progress_bar_config(disable=True)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(both, "decoder_pipe", lambda **kwargs: asked.append(kwargs) or SimpleNamespace(images=[]))
    images = [picture(k, SIZE) for k in range(2)]
    both([SHORT, LONG], images, [mask(SIZE)] * 2, num_images_per_prompt=2, prior_num_inference_steps=2)
    assert asked[0]["image"] == images * 2


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_black_in_the_mask_stays(models: Models, version: str, strength: float) -> None:
    """To the bit, by a UNet that knows nothing of masks, and by 2.2's that is told them; of 2.1 it may be repainted."""
    white = torch.zeros(1, 8, 16, dtype=torch.bool)
    white[:, 2:6, 3:8] = True  # the first pixel of each cell decides
    pixels = source("image", picture(size=SIZE)).sized(*SIZE)
    for inpaints, expected in ((False, white), (True, widened(white))):
        with torch.no_grad():
            known = models[version, inpaints].model.encode(pixels[None])[0]  # type: ignore[attr-defined]
        painted = ours(models[version, inpaints], strength=strength, **part())[0]
        same = (painted == known).all(dim=0)
        if inpaints and version == "2.1":
            assert not same.any()
        else:
            assert torch.equal(same, ~expected[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mask_that_is_white_all_over_leaves_nothing_of_the_picture(models: Models, version: str) -> None:
    asked = part() | {"mask_image": Image.new("L", SIZE[::-1], 255)}
    plain = ours(models[version, False], height=SIZE[0], width=SIZE[1])
    assert torch.equal(ours(models[version, False], **asked), plain)
    other = asked | {"image": picture(1, SIZE)}
    assert torch.equal(ours(models[version, True], **asked), ours(models[version, True], **other))


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inpaints", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_does_not_depend_on_its_batch_and_repeats(
    models: Models, version: str, inpaints: bool, tmp_path: Path
) -> None:
    """Beside other pictures, masks, strengths and rows from noise alone, by the prior; its record knows its files."""
    model, paths = models[version, inpaints], [tmp_path / "in.png", tmp_path / "mask.png"]
    picture(size=SIZE).save(paths[0])
    mask(SIZE).save(paths[1])
    asked: dict[str, Any] = {"output_type": "pt", "prior_num_inference_steps": 2, "rerank": False, **STEPS}
    requests = [
        Request(prompt=SHORT, image=paths[0], mask_image=paths[1], num_images_per_prompt=2, seed=3, **asked),
        Request(prompt=LONG, image=picture(1, SIZE), mask_image=mask(SIZE, (0, 0, 9, 9)), strength=0.5, **asked),
    ]
    if not inpaints:
        requests += [Request(prompt=LONG, image=picture(1, SIZE), seed=3, **asked)]
        requests += [Request(prompt=LONG, height=SIZE[0], width=SIZE[1], seed=3, **asked)]
    together = model.paint(requests)[0]
    alone = model(SHORT, image=paths[0], mask_image=paths[1], seed=4, **asked).images
    assert (alone[0] - together.images[1]).abs().max() <= 1 / 255  # type: ignore[union-attr,operator]
    assert torch.equal(model.repaint(json.loads(json.dumps(together.records[1]))), alone[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_searches_go_from_a_picture_too(models: Models, version: str) -> None:
    asked: dict[str, Any] = {"image": picture(size=(64, 64)), "strength": 0.6, "num_inference_steps": 10, "seed": 1}
    for search in ("halving", "draft"):
        result = models[version, False](
            SHORT, num_images_per_prompt=4, keep=1, search=search, prior_num_inference_steps=2, **asked
        )
        (painted,) = result.images
        again = models[version, False].repaint(result.records[0], [asked["image"]])
        assert (again - source("image", painted).sized(64, 64)).abs().max() <= 1 / 255


@pytest.mark.parametrize("version", VERSIONS)
def test_what_we_save_stock_inpaints_the_same(folders: Folders, models: Models, version: str, tmp_path: Path) -> None:
    """The folder of both; and a decoder for inpainting with its prior beside it is the same model."""
    both = models[version, True]
    index = json.loads((both.save(tmp_path / "saved") / "model_index.json").read_text())
    assert index == json.loads((folders[version, True]["combined"] / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path / "saved").decoder_pipe
    pipeline.set_progress_bar_config(disable=True)
    assert_same(both, pipeline, 1, **part(), guidance_scale=4.0)
    of = folders[version, True]
    assert TextToImage.from_pretrained(of["decoder"], device="cpu", prior_model=of["prior"]).hash == both.hash
    alone = TextToImage.from_pretrained(of["decoder"], device="cpu")
    index = json.loads((alone.save(tmp_path / "alone") / "model_index.json").read_text())
    assert index["_class_name"] == INPAINTS[version]


@pytest.mark.parametrize(
    ("inpaints", "asked", "message"),
    [
        (True, {}, "this model paints a part of a picture anew and does nothing else; give image and mask_image"),
        (True, {"image": picture(size=SIZE)}, "does nothing else; give image and mask_image"),
        (False, {"strength": 0.5}, "strength was given without image"),
        (False, {"image": picture(), "strength": 0.009}, "strength=0.009 leaves none of 100 steps; give 0.01 or more"),
        (False, {"image": picture(size=(60, 64))}, "this model paints multiples of 8; give height=56 and width=64"),
        (False, {"image": picture(), "mask_image": mask((64, 64))}, "mask_image is 64 x 64 pixels, and image 80 x 48"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(
    models: Models, inpaints: bool, asked: dict[str, Any], message: str
) -> None:
    for version in VERSIONS:
        with pytest.raises(ValueError, match=message) as caught:
            resolve(Request(prompt=SHORT, **asked), models[version, inpaints].model.abilities)
        assert "\n" not in str(caught.value)


def test_the_command_line_takes_picture_and_mask(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(size=SIZE).save(tmp_path / "in.png")
    mask(SIZE).save(tmp_path / "mask.png")
    for kind, words in (
        (("2.1", False), ["--strength", "0.6"]),
        (("2.2", True), ["--mask", str(tmp_path / "mask.png")]),
    ):
        argv = ["generate", SHORT, "-n", "1", "--steps", "4", "--prior-steps", "2", "--json"]
        argv += ["--image", str(tmp_path / "in.png"), "--out", str(tmp_path / kind[0]), *words]
        argv += ["--model", str(folders[kind]["combined"])]
        assert main(argv) == 0
        assert main(["reproduce", json.loads(capsys.readouterr().out)["pictures"][0]["path"], "--json"]) == 0
        capsys.readouterr()
    assert main([word for word in argv if word not in words]) == 2
    assert "does nothing else; give --image and --mask" in capsys.readouterr().err
