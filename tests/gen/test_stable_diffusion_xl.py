"""Stable Diffusion XL folders that diffusers wrote, painted by us and by stock diffusers: the same pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from gen import Request, TextToImage
from gen.resolve import resolve
from gen.scheduler import STOCK
from tests.stock import (
    LATENTS,
    LONG,
    PROMPTS,
    SEED,
    SHORT,
    apart,
    assert_same,
    assert_same_sampled,
    edited,
    start,
    stock_of,
)
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether the empty prompt is zeros."""
    root = tmp_path_factory.mktemp("xl")
    return {zeros: make_tiny_stable_diffusion_xl(root / str(zeros), empty_is_zeros=zeros) for zeros in (True, False)}


@pytest.fixture
def xl(models: dict[bool, TextToImage]) -> TextToImage:
    return models[True]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    "guided",
    [{"guidance_scale": 1.0}, {"guidance_scale": 5.0}, {"guidance_scale": 3.0, "negative_prompt": ["blue", LONG]}],
    ids=["unguided", "guided", "negative"],
)
def test_pictures_equal_stock(
    models: dict[bool, TextToImage], folders: dict[bool, Path], zeros: bool, n: int, guided: dict[str, Any]
) -> None:
    assert_same(models[zeros], stock_of(StableDiffusionXLPipeline, folders[zeros]), PROMPTS, n, **guided)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_equals_stock(xl: TextToImage, folders: dict[bool, Path], clip_skip: int) -> None:
    assert_same(xl, stock_of(StableDiffusionXLPipeline, folders[True]), PROMPTS, 1, clip_skip=clip_skip)
    with pytest.raises(ValueError, match="clip_skip=2 is out of range; give a whole number from 0 to 1"):
        xl(SHORT, clip_skip=2)  # the smaller tower has three layers, and the last is never read


@pytest.mark.parametrize(
    "words",
    [
        {"prompt_2": ["a circle", SHORT]},
        {"prompt_2": [LONG, LONG], "negative_prompt": ["blue", ""], "negative_prompt_2": ["", "red"]},
        {"original_size": (40, 90), "target_size": (128, 64), "crops_coords_top_left": (3, 7)},
    ],
    ids=["prompt_2", "negative_prompt_2", "sizes"],
)
def test_a_second_text_and_sizes_equal_stock(
    models: dict[bool, TextToImage], folders: dict[bool, Path], words: dict[str, Any]
) -> None:
    assert_same(models[False], stock_of(StableDiffusionXLPipeline, folders[False]), PROMPTS, 1, **words)
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 3, "output_type": "latent"}
    plain = models[False](PROMPTS, **asked).images
    for name, value in words.items():  # each by itself shows
        assert apart(models[False](PROMPTS, **asked, **{name: value}).images, plain) > 1e-3, name


NULL_SIZES: dict[str, Any] = {
    "negative_original_size": (40, 90),
    "negative_target_size": (128, 64),
    "negative_crops_coords_top_left": (3, 7),
}


def test_sizes_of_the_null_equal_stock(models: dict[bool, TextToImage], folders: dict[bool, Path]) -> None:
    """Of one picture in a call; of several, stock tells some prompts the null's sizes and some nulls the prompt's."""
    xl, stock = models[False], stock_of(StableDiffusionXLPipeline, folders[False])
    asked: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    ours = xl(PROMPTS, seed=SEED, **NULL_SIZES, **asked).images
    each = [stock(prompt, latents=start(1, 1), **NULL_SIZES, **asked).images for prompt in PROMPTS]
    assert apart(ours, torch.cat(each)) <= LATENTS
    together = stock(PROMPTS, latents=start(2, 1), **NULL_SIZES, **asked).images
    assert apart(ours, together) == pytest.approx(0.06, abs=0.01)  # what docs/differences.md says


def test_each_of_the_nulls_sizes_counts_by_itself(xl: TextToImage, folders: dict[bool, Path]) -> None:
    """Stock reads none unless both sizes are given; what is not said of the null is the prompt's."""
    stock = stock_of(StableDiffusionXLPipeline, folders[True])
    asked: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    plain = stock(SHORT, latents=start(1, 1), **asked).images
    for name, value in NULL_SIZES.items():
        words = {name: value}
        assert torch.equal(stock(SHORT, latents=start(1, 1), **words, **asked).images, plain)
        both = dict.fromkeys(("negative_original_size", "negative_target_size"), (64, 64)) | words
        theirs = stock(SHORT, latents=start(1, 1), **both, **asked).images
        ours = xl(SHORT, seed=SEED, **words, **asked).images
        assert apart(ours, theirs) <= LATENTS and apart(ours, plain) > 1e-3
    with pytest.warns(UserWarning, match="negative_original_size is ignored: guidance_scale is 1"):
        xl(SHORT, seed=SEED, guidance_scale=1.0, negative_original_size=(40, 90), **asked)


def test_one_second_text_is_for_all_and_what_is_told_is_recorded(xl: TextToImage) -> None:
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 3, "output_type": "latent"}
    words: dict[str, Any] = {"prompt_2": "a circle", "original_size": (40, 90)}
    one, each = xl(PROMPTS, **asked, **words), xl(PROMPTS, **asked, **words | {"prompt_2": ["a circle"] * 2})
    assert torch.equal(one.images, each.images)
    records = json.loads(json.dumps(one.records))
    assert records[0]["settings"]["prompt_2"] == "a circle" and records[0]["settings"]["original_size"] == [40, 90]
    painted = xl(PROMPTS, **asked | {"output_type": "pt"}, **words).images
    assert all(
        (xl.repaint(record) - pixels).abs().max() < 1e-4 for record, pixels in zip(records, painted, strict=True)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompt_2": ["a", "b", "c"]}, "prompt_2 has 3 texts for 2 prompts; give one or as many"),
        ({"prompt_2": "a", "prompt_weights": True}, "prompt_2 and prompt_weights=True were both given"),
        ({"negative_prompt_2": 3}, "negative_prompt_2 is 3; give a text or a list of texts"),
        ({"original_size": 512}, r"original_size=512 is not a pair of pixels, down and across"),
        ({"target_size": (0, 64)}, "target_size=0 is out of range; give a whole number of 1 or more"),
        ({"crops_coords_top_left": (-1, 0)}, "crops_coords_top_left=-1 is out of range"),
        ({"negative_target_size": (0, 64)}, "negative_target_size=0 is out of range"),
        ({"aesthetic_score": 6.0}, "aesthetic_score was given, but this model is told no score, as a refiner is"),
    ],
)
def test_second_texts_and_sizes_are_checked(xl: TextToImage, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(Request(prompt=PROMPTS, **words), xl.model.abilities)


def test_other_models_have_no_second_text_and_are_told_no_sizes(tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(make_tiny_stable_diffusion(tmp_path / "1"), device="cpu")
    for name, value in {"prompt_2": "a", "negative_prompt_2": "a", "target_size": (8, 8)}.items():
        with pytest.raises(ValueError, match=f"{name} was given, but this model .*; leave it out"):
            model(SHORT, **{name: value})


@pytest.mark.parametrize("sampler", [None, "ddim", "dpmpp_2m", "euler_ancestral"])
def test_samplers_equal_stocks_classes(xl: TextToImage, folders: dict[bool, Path], sampler: str | None) -> None:
    stock = stock_of(StableDiffusionXLPipeline, folders[True])
    if sampler is not None:
        name, options = STOCK[sampler]
        stock.scheduler = getattr(diffusers, name).from_config(stock.scheduler.config, **options)
    assert_same_sampled(xl, stock, sampler)


def test_a_ddim_that_is_not_told_whether_to_clip_clips_as_stock_does(tmp_path: Path) -> None:
    """XL's pipeline leaves its class default alone, where that of 1.x turns it off."""
    folder = make_tiny_stable_diffusion_xl(tmp_path / "xl")
    path = folder / "scheduler" / "scheduler_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "clip_sample"}
    path.write_text(json.dumps(config))
    as_ddim = stock_of(StableDiffusionXLPipeline, folder)
    as_ddim.scheduler = DDIMScheduler.from_config(as_ddim.scheduler.config)
    assert as_ddim.scheduler.config.clip_sample
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    theirs = as_ddim(SHORT, latents=start(1, 1), **asked).images
    assert theirs.abs().max() == 1
    euler = TextToImage.from_pretrained(folder, device="cpu")
    assert apart(euler(SHORT, seed=SEED, sampler="ddim", **asked).images, theirs) <= LATENTS
    edited(path, _class_name="DDIMScheduler")
    edited(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    own = TextToImage.from_pretrained(folder, device="cpu")
    assert apart(own(SHORT, seed=SEED, **asked).images, theirs) <= LATENTS


def test_the_reference_can_fail(models: dict[bool, TextToImage]) -> None:
    """Words, the kind of null, guidance, layers and sizes all show, so that equality above says something."""
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "num_inference_steps": 5}
    plain = models[True](SHORT, **asked).images
    for other in (
        models[False](SHORT, **asked).images,
        models[True](LONG, **asked).images,
        models[True](SHORT, guidance_scale=1.0, **asked).images,
        models[True](SHORT, negative_prompt="blue", **asked).images,
        models[True](SHORT, clip_skip=1, **asked).images,
    ):
        assert apart(other, plain) > 1e-2


def test_requests_of_different_sizes_share_a_batch(xl: TextToImage, folders: dict[bool, Path]) -> None:
    """What the UNet is told of the size is the row's own, and equals stock's of that size."""
    stock = stock_of(StableDiffusionXLPipeline, folders[True])
    asked: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    sizes = [(64, 64), (48, 80), (80, 48)]
    requests = [Request(prompt=SHORT, seed=SEED, height=height, width=width, **asked) for height, width in sizes]
    for (height, width), ours in zip(sizes, xl.paint(requests), strict=True):
        latents = start(1, 1, (height // 8, width // 8))
        theirs = stock(SHORT, height=height, width=width, latents=latents, **asked).images
        assert apart(ours.images, theirs) <= LATENTS
        size = {"original_size": (32, 32), "target_size": (32, 32)}
        sized = stock(SHORT, height=height, width=width, latents=latents, **size, **asked).images
        assert apart(sized, theirs) > 1e-3


def test_embeddings_handed_in_are_stocks_own(xl: TextToImage, folders: dict[bool, Path], tmp_path: Path) -> None:
    stock = stock_of(StableDiffusionXLPipeline, folders[True])
    with torch.no_grad():
        tokens, null, pooled, null_pooled = stock.encode_prompt(PROMPTS)
    embeds = {"prompt_embeds": tokens, "negative_prompt_embeds": null}
    embeds |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": null_pooled}
    asked: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    theirs = stock(latents=start(2, 1), **embeds, **asked).images
    assert apart(xl(seed=SEED, **embeds, **asked).images, theirs) <= LATENTS
    with pytest.raises(ValueError, match="takes prompt_embeds and pooled_prompt_embeds together; give both or none"):
        xl(prompt_embeds=tokens, **asked)
    with pytest.raises(ValueError, match="negative_pooled_prompt_embeds together"):
        xl(SHORT, negative_pooled_prompt_embeds=null_pooled[:1], **asked)
    with pytest.raises(ValueError, match=r"pooled_prompt_embeds has shape \(2, 19\); give \(2, 20\)"):
        xl(prompt_embeds=tokens, pooled_prompt_embeds=pooled[:, 1:], **asked)
    other = TextToImage.from_pretrained(make_tiny_stable_diffusion(tmp_path / "1"), device="cpu")
    with pytest.raises(ValueError, match="takes no pooled text"):
        other(SHORT, pooled_prompt_embeds=pooled[:1], **asked)


def test_what_we_save_stock_paints_the_same(
    models: dict[bool, TextToImage], folders: dict[bool, Path], tmp_path: Path
) -> None:
    for zeros, model in models.items():
        folder = model.save(tmp_path / str(zeros))
        index = json.loads((folder / "model_index.json").read_text())
        assert index == json.loads((folders[zeros] / "model_index.json").read_text())
        assert index["force_zeros_for_empty_prompt"] is zeros
        assert_same(model, stock_of(StableDiffusionXLPipeline, folder), PROMPTS, 1)
        again = TextToImage.from_pretrained(folder, device="cpu")
        before, after = (each(SHORT, seed=1, num_inference_steps=3, output_type="pt").images for each in (model, again))
        assert torch.equal(before, after)


def test_latents_that_the_autoencoder_norms_by_channel(tmp_path: Path) -> None:
    """As finetunes of XL have it."""
    vae = {"latents_mean": [0.1, -0.4, 0.3, 0.2], "latents_std": [1.5, 0.7, 2.0, 1.1]}
    folder = make_tiny_stable_diffusion_xl(tmp_path / "normed", vae=vae)
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert_same(model, stock_of(StableDiffusionXLPipeline, folder), PROMPTS, 1)
    plain = TextToImage.from_pretrained(make_tiny_stable_diffusion_xl(tmp_path / "plain"), device="cpu")
    latents = start(1, 2)
    assert (plain.model.decode(latents) - model.model.decode(latents)).abs().max() > 1e-2
    pixels = model.model.decode(latents)
    moments = torch.tensor(vae["latents_mean"])[:, None, None], torch.tensor(vae["latents_std"])[:, None, None]
    with torch.no_grad():
        raw = model.model.vae.encode(pixels * 2 - 1).latent_dist.mode()
    assert torch.allclose(model.model.encode(pixels), (raw - moments[0]) / moments[1] * 0.8, atol=1e-5)


@pytest.mark.parametrize("forced", [True, False])
def test_the_autoencoder_is_kept_in_float32(folders: dict[bool, Path], tmp_path: Path, forced: bool) -> None:
    """In float16 XL's own overflows; one that was made not to says so (force_upcast)."""
    folder = make_tiny_stable_diffusion_xl(tmp_path / "half", vae={"force_upcast": forced})
    half = TextToImage.from_pretrained(folder, device="cpu", dtype=torch.float16).model
    assert half.unet.dtype == half.text.encoder.dtype == torch.float16
    assert half.vae.dtype == (torch.float32 if forced else torch.float16)
    if forced:
        whole = TextToImage.from_pretrained(folder, device="cpu").model
        latents = start(1, 1)
        assert (half.decode(latents) - whole.decode(latents)).abs().max() < 1e-2  # the weights were rounded


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_index.json", {"tokenizer": [None, None]}, "tokenizer' is missing from model_index.json"),
        ("model_index.json", {"requires_aesthetics_score": True}, "input_dim is 68, but the other parts need 60"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 16}, "tokenizer_2 model_max_length is 16"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "cross_attention_dim is 40"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, change: dict[str, object], message: str) -> None:
    folder = make_tiny_stable_diffusion_xl(tmp_path / "model")
    edited(folder / name, **change)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
