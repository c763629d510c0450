"""A Stable unCLIP folder painted by us and by stock diffusers: the same pictures."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    PriorTransformer,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from gen import TextToImage
from gen.scheduler import STOCK
from samplers.noise import noise
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, SHORT, apart, draws, edited
from tests.stock_unclip import img2img, with_our_noise
from tests.tiny import WIDTH, make_tiny_stable_diffusion, make_tiny_stable_unclip
from tests.tiny_karlo import make_tiny_karlo

TEXTS = [SHORT, LONG]
PROMPTS = ["a small red circle", "a large blue square above a star"]
SEED, N = 11, 2
SEEDS = [SEED, SEED + 1] * len(PROMPTS)
START = noise(SEEDS, "decoder", 0, (4, 8, 8))
PRIOR_START = noise(SEEDS, "prior", 0, (WIDTH,))
COMMON: dict[str, Any] = {"num_images_per_prompt": N, "num_inference_steps": 5}
COMMON |= {"latents": START, "noise_level": 200}


def assert_same(model: TextToImage, stock: Any, n: int, **asked: Any) -> None:
    """From words to final latents and pictures, by one start of each stage and the prior's noise fed in."""
    seeds = [SEED + k for _ in TEXTS for k in range(n)]
    given: dict[str, Any] = {"num_images_per_prompt": n, "num_inference_steps": 5, "prior_num_inference_steps": 4}
    given |= {"noise_level": 200, **asked}
    words = given | {"latents": noise(seeds, "decoder", 0, (4, 8, 8))}
    words["prior_latents"] = noise(seeds, "prior", 0, (WIDTH,))
    with_our_noise(stock, seeds)
    painted = []
    for output_type in ("latent", "pt"):
        rngs = draws("prior", seeds)
        for rng in rngs:
            torch.randn(1, WIDTH, generator=rng)  # block 0 is the start
        painted.append(stock(TEXTS, generator=rngs, output_type=output_type, **words).images)
    ours = [model(TEXTS, seed=SEED, rerank=False, output_type=kind, **given).images for kind in ("latent", "pt")]
    assert apart(ours[0], painted[0]) <= LATENTS
    assert ours[1].shape == (2 * n, 3, 64, 64)
    assert ((ours[1] * 255).round() - (painted[1] * 255).round()).abs().max() <= EIGHT_BIT_LEVEL


WAYS: dict[str, dict[str, Any]] = {
    "unguided": {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
    "guided": {"guidance_scale": 4.0, "prior_guidance_scale": 3.0},
    "prior": {"guidance_scale": 1.0, "prior_guidance_scale": 3.0},
    "negative": {"guidance_scale": 4.0, "prior_guidance_scale": 1.0, "negative_prompt": ["blue", LONG]},
}


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> StableUnCLIPPipeline:
    return StableUnCLIPPipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_whole_pipeline_equals_stock(tiny: TextToImage, stock: StableUnCLIPPipeline, n: int, way: str) -> None:
    assert_same(tiny, stock, n, **WAYS[way])


def test_starts_handed_over_are_the_seeds(tiny: TextToImage) -> None:
    asked = COMMON | {"prior_num_inference_steps": 4, "output_type": "latent", "seed": SEED, "rerank": False}
    given = tiny(PROMPTS, prior_latents=PRIOR_START, **asked).images
    assert torch.equal(tiny(PROMPTS, **(asked | {"latents": None})).images, given)


def test_the_reference_can_fail(tiny: TextToImage) -> None:
    """Words, image embedding, guidance and noise level all show, so that equality above says something."""
    asked = COMMON | {"output_type": "latent", "seed": SEED, "rerank": False}

    def paint(prompts: list[str] = PROMPTS, **other: Any) -> Tensor:
        return tiny(prompts, **(asked | other)).images

    plain = paint()
    for other in (
        paint(prompts=["a green star", "a black star"]),
        paint(prior=False),
        paint(guidance_scale=1.0),
        paint(noise_level=600),
        paint(prior_guidance_scale=1.0),
        paint(negative_prompt="a star"),
    ):
        assert (plain - other).abs().max() > 1e-2


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("negative", [None, ["blue", "a star"]])
def test_decoder_alone_equals_stock_img2img(
    tiny: TextToImage, tiny_folder: Path, guidance_scale: float, negative: list[str] | None
) -> None:
    embeds = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    seeds = [SEED, SEED + 7]
    stock = with_our_noise(img2img(tiny_folder), seeds)
    asked = COMMON | {"num_images_per_prompt": 1, "guidance_scale": guidance_scale, "output_type": "pt"}
    asked |= {"latents": START[:2], "image_embeds": embeds}
    if guidance_scale > 1:
        asked["negative_prompt"] = negative
    theirs = stock(prompt=PROMPTS, **asked).images
    ours = tiny(PROMPTS, seed=seeds, rerank=False, **asked).images
    assert (ours - theirs).abs().max() < 1e-4
    unlike = tiny(PROMPTS, seed=seeds, rerank=False, **(asked | {"image_embeds": -embeds})).images
    assert (ours - unlike).abs().max() > 1e-3


def test_a_folder_without_a_prior_paints_image_embeddings_alone(
    tiny: TextToImage, tiny_folder: Path, tmp_path: Path
) -> None:
    img2img(tiny_folder).save_pretrained(tmp_path / "stock")
    model = TextToImage.from_pretrained(tmp_path / "stock", device="cpu")
    for asked in ({}, {"prior": False}):
        with pytest.raises(ValueError, match="has no prior and paints nothing from a text alone; give image_embeds"):
            model(PROMPTS, **asked)
    embeds = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    words: dict[str, Any] = {"image_embeds": embeds, "seed": SEED, "num_inference_steps": 5, "guidance_scale": 4.0}
    words |= {"output_type": "pt", "rerank": False}
    ours = model("a star", **words).images
    assert torch.equal(ours, tiny("a star", **words).images)
    again = TextToImage.from_pretrained(model.save(tmp_path / "ours"), device="cpu")
    assert again.model.saved_as == "StableUnCLIPImg2ImgPipeline"
    assert torch.equal(again("a star", **words).images, ours)
    # stock's own loader takes it, with the image encoder that is not ours
    parts = {"feature_extractor": None, "image_encoder": img2img(tiny_folder).image_encoder}
    loaded = with_our_noise(StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path / "ours", **parts), [SEED])
    words = {name: value for name, value in words.items() if name not in ("seed", "rerank")}
    theirs = loaded(prompt="a star", latents=START[:1], **words).images
    assert (ours - theirs).abs().max() < 1e-4


def test_karlos_prior_stands_beside_a_folder_without_one(tiny: TextToImage, tiny_folder: Path, tmp_path: Path) -> None:
    """As diffusers' documentation puts them together, for published folders have none."""
    img2img(tiny_folder).save_pretrained(tmp_path / "decoder")
    karlo = make_tiny_karlo(tmp_path / "karlo")
    steps = DDPMScheduler.from_config(UnCLIPScheduler.from_pretrained(karlo, subfolder="prior_scheduler").config)
    stock = StableUnCLIPPipeline.from_pretrained(
        tmp_path / "decoder",
        prior_tokenizer=CLIPTokenizer.from_pretrained(karlo, subfolder="tokenizer"),
        prior_text_encoder=CLIPTextModelWithProjection.from_pretrained(karlo, subfolder="text_encoder"),
        prior=PriorTransformer.from_pretrained(karlo, subfolder="prior"),
        prior_scheduler=steps,
    )
    model = TextToImage.from_pretrained(tmp_path / "decoder", device="cpu", prior_model=karlo)
    for way in ("guided", "prior"):
        assert_same(model, stock, 2, **WAYS[way])
    # another prior than the folder's that the decoder is of
    asked: dict[str, Any] = {"seed": SEED, "prior_num_inference_steps": 4, "num_inference_steps": 3}
    asked |= {"output_type": "pt", "rerank": False}
    result = model(SHORT, **asked)
    assert (result.images - tiny(SHORT, **asked).images).abs().max() > 1e-2
    assert torch.equal(model.repaint(result.records[0]), result.images[0])
    assert result.records[0]["prior_model"] == str(karlo)
    saved = model.save(tmp_path / "saved")
    again = TextToImage.from_pretrained(saved, device="cpu")
    assert again.model.saved_as == "StableUnCLIPPipeline"
    assert torch.equal(again(SHORT, **asked).images, result.images)
    assert_same(model, StableUnCLIPPipeline.from_pretrained(saved), 1, **WAYS["guided"])
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline; model .* needs a UnCLIPPipeline"):
        other = make_tiny_stable_diffusion(tmp_path / "other")
        TextToImage.from_pretrained(tmp_path / "decoder", device="cpu", prior_model=other)
    with pytest.raises(ValueError, match="has its own prior; leave it out"):
        TextToImage.from_pretrained(saved, device="cpu", prior_model=karlo)
    edited(karlo / "model_index.json", prior_scheduler=[None, None])
    with pytest.raises(ValueError, match=r"karlo/prior_scheduler' is missing from model_index.json"):
        TextToImage.from_pretrained(tmp_path / "decoder", device="cpu", prior_model=karlo)


def test_what_we_save_stock_paints_the_same(tiny: TextToImage, tmp_path: Path) -> None:
    assert_same(tiny, StableUnCLIPPipeline.from_pretrained(tiny.save(tmp_path / "saved")), 1, **WAYS["guided"])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_text_alone_is_zeros_over_the_whole_class_input(
    tiny: TextToImage, tiny_folder: Path, guidance_scale: float
) -> None:
    stock = with_our_noise(img2img(tiny_folder), SEEDS)
    stock.noise_image_embeddings = lambda image_embeds, **_: torch.zeros(len(image_embeds), 2 * WIDTH)
    asked = COMMON | {"num_images_per_prompt": 1, "guidance_scale": guidance_scale, "output_type": "pt"}
    asked |= {"latents": START[:2]}
    theirs = stock(prompt=PROMPTS, image_embeds=torch.zeros(2, WIDTH), **asked).images
    ours = tiny(PROMPTS, prior=False, seed=SEED, rerank=False, **(asked | {"noise_level": None})).images
    assert (ours - theirs).abs().max() < 1e-4


DRIVEN = sorted(STOCK.keys() - {"unclip"})  # whose scheduler wants to be told the next timestep, by another pipeline
SCHEDULES = [
    (sampler, spacing)
    for sampler in DRIVEN
    for spacing in ("trailing", "leading", "linspace")
    # stock DDIM and PNDM step T // N down, past the next level they visit
    if (sampler, spacing) not in {("ddim", "linspace"), ("pndm", "linspace")}
]
# Right here and otherwise in stock (tests/samplers/test_stock.py): PNDM of a network of v, and the third order.
UNLIKE = {"pndm", "dpmpp_3m", "dpmpp_3m_sde"}


@pytest.mark.parametrize(("sampler", "spacing"), SCHEDULES)
def test_every_checkpoint_scheduler_equals_stock(tmp_path: Path, sampler: str, spacing: str) -> None:
    """The checkpoint's own scheduler, with one CPU generator per picture where it draws noise."""
    name, options = STOCK[sampler]
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **options}
    config |= {"prediction_type": "epsilon", "timestep_spacing": spacing, "steps_offset": 1}
    config |= {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    scheduler = kind(**{key: value for key, value in config.items() if key in known})
    folder = make_tiny_stable_unclip(tmp_path / "model", scheduler=scheduler)
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert model.model.abilities.defaults.sampler == sampler

    rngs = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    start = torch.cat([torch.randn(1, 4, 8, 8, generator=rng) for rng in rngs])
    assert torch.equal(start, START)
    asked = COMMON | {"guidance_scale": 2.0, "output_type": "latent", "prior_num_inference_steps": 2}
    asked |= {"prior_latents": PRIOR_START, "num_inference_steps": 4}
    stock = with_our_noise(StableUnCLIPPipeline.from_pretrained(folder), SEEDS)
    theirs = stock(PROMPTS, generator=rngs, **asked).images
    ours = model(PROMPTS, seed=SEED, rerank=False, **asked).images
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("sampler", sorted(set(DRIVEN) - UNLIKE))
def test_another_sampler_is_stocks_class_from_the_checkpoints_config(
    tiny: TextToImage, tiny_folder: Path, sampler: str
) -> None:
    name, options = STOCK[sampler]
    stock = with_our_noise(StableUnCLIPPipeline.from_pretrained(tiny_folder), SEEDS)
    stock.scheduler = getattr(diffusers, name).from_config(stock.scheduler.config, **options)
    rngs = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    for rng in rngs:
        torch.randn(1, 4, 8, 8, generator=rng)  # block 0 is the start
    asked = COMMON | {"guidance_scale": 3.0, "output_type": "pt", "prior_latents": PRIOR_START}
    asked |= {"prior_num_inference_steps": 2}
    theirs = stock(PROMPTS, generator=rngs, **asked).images
    ours = tiny(PROMPTS, seed=SEED, rerank=False, sampler=sampler, **asked).images
    assert (ours - theirs).abs().max() < 1e-4


def test_prompt_embeds_and_clip_skip_are_diffusers_own(tiny: TextToImage) -> None:
    asked: dict[str, Any] = {"seed": 3, "output_type": "latent", "rerank": False, "prior": False}
    words = tiny("a red circle", **asked).images
    text = tiny.model.text
    with torch.no_grad():
        features, null, skipped = text(["a red circle"]), text([""]), text(["a red circle"], clip_skip=1)
    handed = tiny(prompt_embeds=features.tokens, negative_prompt_embeds=null.tokens, **asked).images
    assert torch.allclose(handed, words, atol=1e-6)
    assert torch.allclose(tiny("a red circle", clip_skip=0, **asked).images, words, atol=1e-6)
    one_less = tiny("a red circle", clip_skip=1, **asked).images
    assert (one_less - words).abs().max() > 1e-3
    handed = tiny(prompt_embeds=skipped.tokens, negative_prompt_embeds=null.tokens, **asked).images
    assert torch.allclose(one_less, handed, atol=1e-6)
