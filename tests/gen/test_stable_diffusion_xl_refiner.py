"""Stable Diffusion XL's refiner, as diffusers writes it: by us and by stock's StableDiffusionXLImg2ImgPipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from gen import Request, TextToImage, command
from gen.picture import largest_difference, read_png
from gen.resolve import resolve
from tests.pictures import picture
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, PROMPTS, SEED, SHORT, apart, edited, stock_of
from tests.tiny import make_tiny_stable_diffusion_xl

IMAGE = picture(size=(64, 64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether the empty prompt is zeros; the published one's is not."""
    root = tmp_path_factory.mktemp("refiner")
    options: dict[str, Any] = {"refines": True, "vae": {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}}
    return {
        zeros: make_tiny_stable_diffusion_xl(root / str(zeros), empty_is_zeros=zeros, **options) for zeros in (0, 1)
    }


@pytest.fixture(scope="module")
def stocks(folders: dict[bool, Path]) -> dict[bool, Any]:
    return {zeros: stock_of(StableDiffusionXLImg2ImgPipeline, folder) for zeros, folder in folders.items()}


@pytest.fixture
def refiner(models: dict[bool, TextToImage]) -> TextToImage:
    return models[False]


def both(model: TextToImage, stock: Any, n: int = 1, **asked: Any) -> tuple[Any, Any]:
    """The same pictures by us and by stock, of one generator for each."""
    asked = {"num_inference_steps": 5, "num_images_per_prompt": n, "strength": 0.6, "output_type": "latent"} | asked
    rngs = [torch.Generator().manual_seed(SEED + k) for _ in PROMPTS for k in range(n)]
    theirs = stock(PROMPTS, image=[IMAGE] * len(rngs), generator=rngs, **asked).images
    return model(PROMPTS, image=IMAGE, seed=SEED, **asked).images, theirs


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "guided",
    [{"guidance_scale": 1.0}, {"guidance_scale": 5.0}, {"guidance_scale": 3.0, "negative_prompt": ["blue", LONG]}],
    ids=["unguided", "guided", "negative"],
)
def test_pictures_equal_stock(
    models: dict[bool, TextToImage], stocks: dict[bool, Any], zeros: bool, n: int, guided: dict[str, Any]
) -> None:
    assert apart(*both(models[zeros], stocks[zeros], n, **guided)) <= LATENTS
    same = zip(*both(models[zeros], stocks[zeros], n, output_type="pil", **guided), strict=True)
    assert max(largest_difference(a, b) for a, b in same) <= EIGHT_BIT_LEVEL


@pytest.mark.parametrize(
    "words",
    [
        {"aesthetic_score": 9.0},
        {"negative_aesthetic_score": 1.0},
        {"original_size": (40, 90), "crops_coords_top_left": (3, 7), "negative_crops_coords_top_left": (3, 7)},
        {"negative_original_size": (40, 90), "negative_crops_coords_top_left": (3, 7)},
        {"clip_skip": 1},
        {"strength": 1.0},
    ],
    ids=["score", "negative_score", "sizes", "negative_sizes", "clip_skip", "strength"],
)
def test_what_it_is_told_equals_stock(refiner: TextToImage, stocks: dict[bool, Any], words: dict[str, Any]) -> None:
    ours, theirs = both(refiner, stocks[False], **words)
    assert apart(ours, theirs) <= LATENTS
    assert apart(ours, both(refiner, stocks[False])[1]) > 1e-3  # it shows


def test_the_scores_are_the_models_defaults_and_stand_in_the_record(refiner: TextToImage) -> None:
    asked: dict[str, Any] = {"image": IMAGE, "seed": SEED, "num_inference_steps": 5, "output_type": "pt"}
    plain, named = refiner(SHORT, **asked), refiner(SHORT, aesthetic_score=6, negative_aesthetic_score=2.5, **asked)
    assert torch.equal(plain.images, named.images)
    scored = refiner(SHORT, aesthetic_score=8.0, **asked)
    record = json.loads(json.dumps(scored.records[0]))
    assert record["settings"]["aesthetic_score"] == 8.0 and record["settings"]["negative_aesthetic_score"] == 2.5
    assert torch.equal(refiner.repaint(record, [IMAGE]), scored.images[0])
    assert not torch.equal(scored.images, plain.images)


def test_requests_of_different_scores_share_a_batch(refiner: TextToImage) -> None:
    asked: dict[str, Any] = {"image": IMAGE, "strength": 1.0, "seed": SEED, "num_inference_steps": 5}
    asked["output_type"] = "latent"
    requests = [Request(prompt=SHORT, aesthetic_score=score, **asked) for score in (2.0, 9.0)]
    together = [result.images for result in refiner.paint(requests)]
    alone = [refiner.paint([each])[0].images for each in requests]
    assert max(apart(a, b) for a, b in zip(together, alone, strict=True)) <= LATENTS
    assert apart(*together) > 1e-2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "this model refines a picture and paints none from words alone; give image"),
        ({"image": IMAGE, "aesthetic_score": -1}, "aesthetic_score=-1 is out of range"),
        ({"image": IMAGE, "negative_aesthetic_score": "high"}, "negative_aesthetic_score='high' is of type str"),
        (
            {"image": IMAGE, "prompt_2": "a"},
            "prompt_2 was given, but this model has no second text tower; leave it out",
        ),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(
    refiner: TextToImage, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(Request(prompt=SHORT, **asked), refiner.model.abilities)
    assert "\n" not in str(caught.value)


def test_what_it_is_not_told_is_ignored_aloud(refiner: TextToImage) -> None:
    with pytest.warns(UserWarning, match="target_size is ignored: this model is told a score in its place"):
        resolve(Request(prompt=SHORT, image=IMAGE, target_size=(8, 8)), refiner.model.abilities)


def test_what_we_save_stock_paints_the_same(
    models: dict[bool, TextToImage], folders: dict[bool, Path], tmp_path: Path
) -> None:
    for zeros, model in models.items():
        folder = model.save(tmp_path / str(zeros))
        index, theirs = (json.loads((each / "model_index.json").read_text()) for each in (folder, folders[zeros]))
        assert index == theirs
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {
            path.name for path in folders[zeros].iterdir() if path.is_dir()
        }
        assert apart(*both(model, stock_of(StableDiffusionXLImg2ImgPipeline, folder))) <= LATENTS


def test_texts_of_its_own_are_the_one_tower_it_has(refiner: TextToImage) -> None:
    """A LoRA or a learned word then changes what is read, and not a copy of it."""
    own = refiner.model.with_own_texts()
    assert own.text.encoder is own.text_encoder_2.text_model
    assert {"tokenizer_2", "text_encoder_2"} < own.parts().keys() and "text_encoder" not in own.parts()


def test_a_base_that_the_same_class_saved_is_a_base(tmp_path: Path) -> None:
    """As stock's image to image writes it; it paints from words too."""
    folder = make_tiny_stable_diffusion_xl(tmp_path / "base")
    edited(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=False)
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert apart(*both(model, stock_of(StableDiffusionXLImg2ImgPipeline, folder))) <= LATENTS
    assert model(SHORT, seed=SEED, num_inference_steps=2, output_type="latent").images.shape == (1, 4, 8, 8)
    assert model.model.saved_as == "StableDiffusionXLPipeline"


def test_the_command_line_refines(
    folders: dict[bool, Path], refiner: TextToImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    IMAGE.save(tmp_path / "in.png")
    asked = ["generate", SHORT, "--model", str(folders[False]), "-n", "1", "--steps", "4", "--out", str(tmp_path / "o")]
    assert command.main(asked) == 2
    assert "give --image" in capsys.readouterr().err
    argv = ["--aesthetic-score", "8", "--negative-aesthetic-score", "1", "--negative-original-size", "40", "90"]
    assert command.main([*asked, "--image", str(tmp_path / "in.png"), *argv, "--seed", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words: dict[str, Any] = {"aesthetic_score": 8, "negative_aesthetic_score": 1, "negative_original_size": (40, 90)}
    ours = refiner(SHORT, image=IMAGE, num_inference_steps=4, seed=3, **words).images
    assert largest_difference(read_png(Path(found["pictures"][0]["path"]))[0], ours[0]) == 0
