"""Karlo folders painted by us and by stock's pipelines put together from the same parts: the same pictures."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from diffusers.pipelines.deprecated.unclip import pipeline_unclip, pipeline_unclip_image_variation
from diffusers.schedulers import scheduling_unclip
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from gen import Request, TextToImage
from gen.card import Card
from gen.checkpoint import Parts
from gen.conditioning import Conditions, Table
from gen.facts import facts_of
from gen.families.karlo import Karlo
from gen.model_index import part_class
from gen.resolve import resolve
from gen.rows import Rows
from gen.upscale import STAGE as SUPER_RESOLUTION
from samplers.noise import noise
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, PROMPTS, SHORT, apart, edited, shapes
from tests.tiny import WIDTH, make_tiny_clip, tiny_tokenizer
from tests.tiny_karlo import LARGE, SMALL, make_tiny_karlo, stock_karlo

SEED = 30
STEPS: dict[str, Any] = {"prior_num_inference_steps": 3, "num_inference_steps": 4, "super_res_num_inference_steps": 3}
SHAPES = {(WIDTH,): "prior", (3, SMALL, SMALL): "decoder", (3, LARGE, LARGE): "super_resolution"}
STOCK_WORDS = {"num_inference_steps": "decoder_num_inference_steps", "guidance_scale": "decoder_guidance_scale"}
STOCK_WORDS |= {"image_embeds": "image_embeddings"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_karlo(tmp_path_factory.mktemp("karlo") / "karlo")


@pytest.fixture(scope="session")
def variation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_karlo(tmp_path_factory.mktemp("karlo") / "variation", prior=False)


@pytest.fixture(scope="session")
def model(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="session")
def variation(variation_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(variation_folder, device="cpu")


@pytest.fixture(scope="session")
def ranked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    clip = make_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")
    return TextToImage.from_pretrained(folder, device="cpu", clip=clip)


def stock_images(folder: Path, seeds: list[int], monkeypatch: pytest.MonkeyPatch, **asked: Any) -> tuple[Tensor, Any]:
    """What stock's last step says and the pictures it makes of that, from the noise that our seeds stand for."""
    blocks = dict.fromkeys(SHAPES.values(), 0)

    def drawn(shape: tuple[int, ...], **_: Any) -> Tensor:
        stage = SHAPES[tuple(shape[1:])]
        block = noise(seeds, stage, blocks[stage], shape[1:])
        blocks[stage] += 1
        return block

    for module in (pipeline_unclip, pipeline_unclip_image_variation, scheduling_unclip):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    stock, ends = stock_karlo(folder), []
    for scheduler in (stock.decoder_scheduler, stock.super_res_scheduler):

        def noted(output: Tensor, t: Tensor, *args: Any, step: Any = scheduler.step, **kwargs: Any) -> Any:
            taken = step(output, t, *args, **kwargs)
            # sigma is 20291 here, so that an estimate that is not clipped stands in the last digits of eps
            assert t < 999 or bool((taken.pred_original_sample.abs() == 1).all()), "take another seed"
            ends.append(taken.prev_sample)
            return taken

        scheduler.step = noted
    negative = asked.pop("negative_prompt", None)
    if negative is not None:  # stock has none; its null is what the tokenizer makes of ""
        tokenizer = stock.tokenizer
        stock.tokenizer = lambda texts, **kwargs: tokenizer([text or negative for text in texts], **kwargs)
        stock.tokenizer.model_max_length = tokenizer.model_max_length  # type: ignore[attr-defined]
    stock_words = {STOCK_WORDS.get(name, name): value for name, value in asked.items()}
    pictures = stock(**stock_words, output_type="np").images
    return ends[-1], torch.from_numpy(pictures).permute(0, 3, 1, 2)


def assert_same(
    model: TextToImage, folder: Path, prompts: list[str] | None, n: int, patch: pytest.MonkeyPatch, **asked: Any
) -> None:
    """The last stage's result, and the pictures, of one start."""
    asked = STEPS | asked
    if prompts is None:
        del asked["prior_num_inference_steps"]
    given = {"num_images_per_prompt": n} | asked | ({} if prompts is None else {"prompt": prompts})
    number = len(prompts or asked["image_embeds"])
    theirs, pictures = stock_images(folder, [SEED + k for _ in range(number) for k in range(n)], patch, **given)
    given |= {"seed": SEED, "rerank": False}
    assert apart(model(**given, output_type="latent").images, theirs) <= LATENTS
    ours = model(**given, output_type="pt").images
    assert len(ours) == number * n and (ours - pictures).abs().max() * 255 <= EIGHT_BIT_LEVEL


# --- the same pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    "guided",
    [
        {"prior_guidance_scale": 1.0, "guidance_scale": 1.0},
        {"prior_guidance_scale": 4.0, "guidance_scale": 8.0},
        {"prior_guidance_scale": 4.0, "guidance_scale": 1.0},
        {"prior_guidance_scale": 1.0, "guidance_scale": 8.0},
        {"prior_guidance_scale": 1.0, "guidance_scale": 3.0, "negative_prompt": "blue"},
    ],
    ids=["unguided", "guided", "prior", "decoder", "negative"],
)
def test_pictures_equal_stock(
    model: TextToImage, folder: Path, n: int, guided: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(model, folder, PROMPTS, n, monkeypatch, **guided)


def test_the_reference_can_fail(model: TextToImage) -> None:
    """Words, prior, guidance and each stage's noise all show, so that equality above says something."""
    asked: dict[str, Any] = STEPS | {"seed": SEED, "output_type": "latent"}
    plain = model(SHORT, **asked).images
    for other in (
        model(LONG, **asked).images,
        model(SHORT, **(asked | {"prior": False})).images,
        model(SHORT, negative_prompt="blue", **asked).images,
        model(SHORT, guidance_scale=1.0, **asked).images,
        model(SHORT, prior_guidance_scale=1.0, **asked).images,
        model(SHORT, clip_skip=1, **asked).images,
        model(SHORT, **(asked | {"super_res_num_inference_steps": 2})).images,
    ):
        assert apart(plain, other) > 1e-2


def test_stocks_defaults_are_ours(model: TextToImage) -> None:
    stock = inspect.signature(pipeline_unclip.UnCLIPPipeline.__call__).parameters
    settings = model.model.abilities.defaults
    for name in [*STEPS, "guidance_scale", "prior_guidance_scale"]:
        assert getattr(settings, name) == stock[STOCK_WORDS.get(name, name)].default
    assert (settings.height, settings.width, settings.sampler, settings.prior) == (LARGE, LARGE, "unclip", True)


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
def test_variations_equal_stock(
    variation: TextToImage, variation_folder: Path, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"image_embeds": embeds, "guidance_scale": guidance_scale}
    assert_same(variation, variation_folder, None, 3, monkeypatch, **asked)
    asked |= {"seed": SEED, "output_type": "latent"}
    plain = variation(**asked).images
    assert apart(plain, variation(**(asked | {"image_embeds": -embeds})).images) > 1e-2
    # words beside the picture, which stock has not
    assert apart(plain, variation(PROMPTS, rerank=False, **asked).images) > 1e-2


def test_the_prior_and_its_own_answer_paint_the_same(model: TextToImage) -> None:
    (candidate,) = resolve(Request(prompt=SHORT, seed=SEED, **STEPS), model.model.abilities).candidates
    assert model.model.prior is not None
    with torch.no_grad():
        embeds = model.model.prior.sample([candidate])
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "num_inference_steps": 4}
    asked["super_res_num_inference_steps"] = 3
    ours = model(SHORT, prior_num_inference_steps=3, **asked).images
    assert apart(model(SHORT, image_embeds=embeds, **asked).images, ours) <= 1e-6


def test_every_stages_start_can_be_handed_over(model: TextToImage, tiny: TextToImage) -> None:
    """As stock takes it; the later blocks stay the seed's."""
    asked: dict[str, Any] = STEPS | {"num_images_per_prompt": 2, "seed": SEED, "output_type": "latent"}
    names = {"prior": "prior_latents", "decoder": "latents", "super_resolution": "super_res_latents"}
    own = {names[stage]: noise([SEED, SEED + 1], stage, 0, shape) for shape, stage in SHAPES.items()}
    plain = model(SHORT, **asked).images
    assert torch.equal(model(SHORT, **own, **asked).images, plain)
    for name, start in own.items():
        # of the prior's start nothing is left but what its first estimate makes of it, here very little
        least = 0 if name == "prior_latents" else 1e-2
        assert apart(model(SHORT, **{name: start.flip(0)}, **asked).images, plain) > least
    with pytest.raises(ValueError, match=re.escape("super_res_latents has shape (1, 3, 8, 8); give (2, 3, 16, 16)")):
        model(SHORT, super_res_latents=torch.zeros(1, 3, 8, 8), **asked)
    with pytest.warns(UserWarning, match="super_res_latents is ignored: this model has no super resolution"):
        tiny(SHORT, num_inference_steps=1, prior=False, super_res_latents=torch.zeros(1, 3, 8, 8))


def test_words_have_weights_and_texts_may_be_long(model: TextToImage) -> None:
    """In what the text tower says, before the image's tokens come in front of it."""
    asked: dict[str, Any] = STEPS | {"seed": SEED, "output_type": "latent"}
    plain, weighty = model(SHORT, **asked).images, asked | {"prompt_weights": True}
    assert torch.equal(model(SHORT, **weighty).images, plain)
    assert apart(model("a (star:1.0)", **weighty).images, plain) <= LATENTS
    assert apart(model("a (star:1.5)", **weighty).images, plain) > 1e-2
    long = " ".join([LONG] * 3)
    both = model([SHORT, long], long_prompts=True, **asked).images
    assert apart(both[:1], plain) <= LATENTS
    assert apart(both[1:], model(long, long_prompts=True, **asked).images) <= LATENTS
    assert apart(both[1:], model(long, **asked).images) > 1e-2


# --- whatever is painted beside it -------------------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_batch(model: TextToImage) -> None:
    """Rows of other lengths, sizes and guidance in every stage; sampled as the checkpoint says and otherwise."""
    plain = Request(prompt=SHORT, seed=7, output_type="pt", **STEPS)
    requests = [
        plain,
        replace(plain, prompt=LONG, seed=1, guidance_scale=1.0),
        replace(plain, num_inference_steps=2, super_res_num_inference_steps=5, num_images_per_prompt=3),
        replace(plain, height=32, width=16, prior=False),
        replace(plain, sampler="euler", negative_prompt="blue"),
    ]
    alone = [model.paint([request])[0].images for request in requests]
    for batch_size in (None, 2):
        for one, whole in zip(model.paint(requests, batch_size=batch_size), alone, strict=True):
            assert (one.images - whole).abs().max() * 255 <= EIGHT_BIT_LEVEL
    assert alone[3].shape == (1, 3, 32, 16)
    assert (alone[2][0] - alone[0][0]).abs().max() * 255 > EIGHT_BIT_LEVEL


def test_a_search_looks_at_small_pictures_and_a_record_paints_again(ranked: TextToImage) -> None:
    asked: dict[str, Any] = {"seed": 7, "num_images_per_prompt": 4, "keep": 2, "output_type": "pt"} | STEPS
    result = ranked(SHORT, search="halving", **(asked | {"num_inference_steps": 10}))
    account = result.account
    assert account.previews > 0 and account.decodes == sum(one.painted for one in result.candidates) == 2
    assert account.evaluations["super_resolution"] == 2 * 3  # of those that were painted, unguided
    copied = ranked(SHORT, search="feynman_kac", **asked)
    for one in (result, copied):
        for image, record in zip(one.images, one.records, strict=True):
            assert (ranked.repaint(json.loads(json.dumps(record))) - image).abs().max() * 255 <= EIGHT_BIT_LEVEL
    seen: dict[str, int] = {}
    ranked(SHORT, seed=3, callback=lambda step: seen.update({step.stage: seen.get(step.stage, 0) + 1}), **STEPS)
    assert seen == {"prior": 3, "decoder": 4, "super_resolution": 3}


# --- one step, which stock cannot take ---------------------------------------------------------------------------


def test_stock_cannot_take_one_step(folder: Path) -> None:
    """The day this fails, compare with stock below."""
    stock = stock_karlo(folder)
    for scheduler in (stock.prior_scheduler, stock.decoder_scheduler, stock.super_res_scheduler):
        with pytest.raises(ZeroDivisionError):
            scheduler.set_timesteps(1)


def test_one_step_goes_from_noise_to_the_estimate(model: TextToImage) -> None:
    """By hand, of super resolution, whose only step is its last; and all stages in one step each."""
    assert isinstance(model.model, Karlo)
    upscaler = model.model.upscaler
    (candidate,) = resolve(
        Request(prompt=SHORT, seed=SEED, super_res_num_inference_steps=1), model.model.abilities
    ).candidates
    small = torch.linspace(-1.5, 1.5, 3 * SMALL * SMALL).reshape(3, SMALL, SMALL)
    x = noise([SEED], SUPER_RESOLUTION, 0, (3, LARGE, LARGE))
    large = F.interpolate(small[None].clamp(-1, 1), LARGE, mode="bicubic", antialias=True)
    with torch.no_grad():
        rows = Rows(upscaler.call, upscaler.levels.scaling, SUPER_RESOLUTION)
        ((finished,),) = rows.run(upscaler.rows([candidate], [0], [small]))
        output = upscaler.last(torch.cat([x, large], dim=1), 999).sample
    alpha_bar = upscaler.levels.stock.alphas_cumprod[999].double()
    by_hand = ((x - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()).clamp(-1, 1)
    assert apart(finished.x[None], by_hand) <= LATENTS
    pictures = model(SHORT, seed=SEED, output_type="pt", **dict.fromkeys(STEPS, 1)).images
    assert pictures.shape == (1, 3, LARGE, LARGE) and bool(pictures.isfinite().all())


# --- folders ------------------------------------------------------------------------------------------------------


def test_stock_cannot_load_what_it_saves(folder: Path) -> None:
    """The day this fails, take stock's own loader above."""
    with pytest.raises((ValueError, AttributeError), match="UnCLIPTextProjModel"):  # before 0.42 the latter
        pipeline_unclip.UnCLIPPipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["karlo", "variation"])
def test_what_is_saved_is_stocks_parts_again(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, source = {"karlo": ("model", "folder"), "variation": ("variation", "variation_folder")}[kind]
    ours, whence = request.getfixturevalue(name), request.getfixturevalue(source)
    saved = ours.save(tmp_path / "saved")
    old, new = (json.loads((each / "model_index.json").read_text()) for each in (whence, saved))
    assert new["text_proj"] == ["unclip", "UnCLIPTextProjModel"]  # as published; stock writes "diffusers"
    assert new["_class_name"] == old["_class_name"]
    assert {part for part, entry in new.items() if isinstance(entry, list)} == {
        part for part, entry in old.items() if isinstance(entry, list)
    }
    for part in ("image_encoder", "feature_extractor"):
        assert new.get(part) == old.get(part) and (saved / part).is_dir() == (part in old)
    again = TextToImage.from_pretrained(saved, device="cpu")
    words: dict[str, Any] = {"prompts": PROMPTS} if kind == "karlo" else {"prompts": None}
    if kind == "variation":
        words["image_embeds"] = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    assert_same(again, saved, n=1, patch=monkeypatch, **words)


def test_a_learned_word_is_the_priors_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder has one text tower for both; stock's parts of a saved model read it so as well."""
    model = TextToImage.from_pretrained(folder, device="cpu")
    save_file(
        {"<cat>": 3 * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))}, tmp_path / "a.safetensors"
    )
    before = model("a <cat>", seed=SEED, output_type="latent", **STEPS).images
    model.load_textual_inversion(tmp_path / "a.safetensors")
    assert "the prior does not know" not in caplog.text
    assert apart(model("a <cat>", seed=SEED, output_type="latent", **STEPS).images, before) > 1e-2
    saved = model.save(tmp_path / "saved")
    assert_same(TextToImage.from_pretrained(saved, device="cpu"), saved, ["a <cat>", SHORT], 1, monkeypatch)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_index.json", {"prior": [None, None]}, "prior' is missing from model_index.json"),
        ("model_index.json", {"super_res_last": [None, None]}, "super_res_last' is missing from model_index.json"),
        ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "decoder out_channels is 6"),
        ("super_res_scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "first out_channels is 3"),
        ("prior_scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type='flow' is not"),
        ("decoder/config.json", {"class_embed_type": None}, "decoder class_embed_type is None, .* need identity"),
        ("decoder/config.json", {"sample_size": None}, "decoder sample_size is None; it has to be a number"),
        ("super_res_last/config.json", {"sample_size": 32}, "super_res_last sample_size is 32, .* need 16"),
        ("text_proj/config.json", {"time_embed_dim": 16}, r"text_proj' is damaged: weights .* of another shape"),
        ("text_encoder/config.json", {"max_position_embeddings": 16}, "text_encoder"),
    ],
)
def test_what_does_not_fit_is_refused(copy: Path, name: str, change: dict[str, object], message: str) -> None:
    edited(copy / name, **change)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_an_unknown_scheduler_and_a_missing_folder_are_refused(copy: Path) -> None:
    edited(copy / "model_index.json", decoder_scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(ValueError, match="decoder_scheduler: scheduler EDMEulerScheduler is not supported") as caught:
        TextToImage.from_pretrained(copy, device="cpu")
    assert "\n" not in str(caught.value)
    shutil.rmtree(copy / "super_res_first")
    with pytest.raises(ValueError, match="super_res_first' is missing; the folder is not complete"):
        TextToImage.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": SHORT, "height": 18}, "height=18 .*; give a multiple of 4"),
        ({"prompt": SHORT, "super_res_num_inference_steps": 0}, "super_res_num_inference_steps=0 is out of range"),
        ({"prompt": SHORT, "prompt_embeds": torch.zeros(1, 32, WIDTH)}, "prompt_embeds was given, but this model"),
        ({"image_embeds": torch.zeros(1, 3)}, re.escape("image_embeds has shape (1, 3); give (1, 16)")),
    ],
)
def test_what_it_cannot_paint_is_refused(model: TextToImage, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**asked)


def test_a_picture_is_seen_by_the_folders_own_tower(
    variation: TextToImage, variation_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tower = stock_karlo(variation_folder)
    values = tower.feature_extractor(pixels, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = tower.image_encoder(values).image_embeds
    asked: dict[str, Any] = {"seed": SEED, "output_type": "pt", "num_inference_steps": 2}
    seen = variation(variation_of=pixels, **asked)
    assert (seen.images - variation(image_embeds=embeds, **asked).images).abs().max() <= 1e-4
    assert torch.equal(variation.repaint(seen.records[0], [pixels]), seen.images[0])


def test_two_prompts_meet_in_what_the_towers_say(model: TextToImage) -> None:
    asked: dict[str, Any] = {"seed": SEED, "output_type": "pt", "num_inference_steps": 2}
    ends = model(PROMPTS, **asked).images
    ways = [
        model(PROMPTS[0], interpolate_prompt=PROMPTS[1], interpolation=share, **asked).images[0]
        for share in (0, 0.5, 1)
    ]
    assert (ways[0] - ends[0]).abs().max() <= 1e-4 and (ways[2] - ends[1]).abs().max() <= 1e-4
    assert min((ways[1] - end).abs().max() for end in ends) > 1e-3
    with pytest.raises(ValueError, match="image was given, but this model cannot begin with a picture; leave it out"):
        model(PROMPTS[0], image=torch.rand(3, 16, 16), **asked)


def test_variations_need_an_image(variation: TextToImage) -> None:
    for asked in ({}, {"prior": False}):
        with pytest.raises(ValueError, match="has no prior and paints nothing from a text alone; give image_embeds"):
            variation(SHORT, **asked)


# --- at full size, without memory -------------------------------------------------------------------------------

BLOCKS = {"block_out_channels": (320, 640, 960, 1280), "layers_per_block": 3}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_L |= {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768, "eos_token_id": 49407}


@torch.no_grad()
def test_full_size(folder: Path) -> None:
    """Karlo v1 alpha, as diffusers' own conversion of it says; a call of each network."""
    tokenizer = tiny_tokenizer()  # its words are of no account here, the length is
    tokenizer.model_max_length = 77
    names = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
    schedulers = {name: UnCLIPScheduler.from_pretrained(folder / name) for name in names}
    kinds = {entry: part_class("diffusers", entry, folder) for entry in ("UNet2DConditionModel", "UNet2DModel")}
    with torch.device("meta"):
        super_res: list[Any] = [
            kinds["UNet2DModel"](
                **BLOCKS,
                sample_size=256,
                in_channels=6,
                out_channels=3,
                down_block_types=("ResnetDownsampleBlock2D",) * 4,
                up_block_types=("ResnetUpsampleBlock2D",) * 4,
                add_attention=False,
            )
            for _ in range(2)
        ]
        parts: dict[str, Any] = {
            "prior": PriorTransformer(),
            "decoder": kinds["UNet2DConditionModel"](
                **BLOCKS,
                sample_size=64,
                in_channels=3,
                out_channels=6,
                down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
                up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                cross_attention_dim=1536,
                class_embed_type="identity",
                attention_head_dim=64,
                resnet_time_scale_shift="scale_shift",
            ),
            "text_proj": part_class("unclip", "UnCLIPTextProjModel", folder)(
                time_embed_dim=4 * 320, cross_attention_dim=1536
            ),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L)),
            "super_res_first": super_res[0],
            "super_res_last": super_res[1],
        }
    parts |= {"tokenizer": tokenizer, **schedulers}
    model = Karlo.of(Parts("UnCLIPPipeline", parts, None, Card(), Path("karlo")))
    settings = model.abilities.defaults
    assert (settings.height, settings.width, model.abilities.size_multiple) == (256, 256, 32)
    assert model.levels.scaling.learned_range

    stock = pipeline_unclip.UnCLIPPipeline(**parts)
    theirs = {part: shapes(module) for part, module in stock.components.items() if isinstance(module, nn.Module)}
    ours = {part: shapes(module) for part, module in model.parts().items() if isinstance(module, nn.Module)}
    assert ours == theirs

    (candidate,) = resolve(Request(prompt=SHORT, seed=0), model.abilities).candidates
    ((words, null),) = model.encode_prompts([candidate], Table())
    (prompt,) = model.add_image_embeds([candidate], [words], [torch.empty(768, device="meta")])
    for each in (prompt, null):
        assert each is not None and each.encoder_hidden_states is not None and each.attention_mask is not None
        assert each.encoder_hidden_states.shape == (4 + 77, 1536) and each.attention_mask.shape == (4 + 77,)
    assert null is not None
    x, timestep = torch.empty(2, *model.latent_shape(settings), device="meta"), torch.empty(2, device="meta")
    assert x.shape == (2, 3, 64, 64) and model.call(x, timestep, Conditions((null, prompt))).shape == (2, 6, 64, 64)
    (row,) = model.upscaler.rows([candidate], [0], [x[0]])
    assert row.last is not None and row.shape == (3, 256, 256)
    large = torch.empty(2, *row.shape, device="meta")
    assert model.upscaler.call(large, timestep, Conditions((row.prompt, row.last))).shape == large.shape
    assert model.decode(large).shape == large.shape


def test_info_tells_the_family(folder: Path) -> None:
    facts = facts_of(str(folder))
    assert facts["family"] == "UnCLIPPipeline"
    assert set(facts["parts"]) >= {"prior", "text_proj", "decoder", "super_res_first", "super_res_last"}
    assert all(facts["parts"][part]["parameters"] > 0 for part in ("text_proj", "super_res_last"))
