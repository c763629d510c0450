"""Kandinsky 2.2 and 2.1 folders that diffusers wrote, painted by us and by its own pipelines: the same pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gen import Request, TextToImage
from gen.answer import as_output
from gen.command import main
from gen.facts import facts_of
from gen.picture import largest_difference
from gen.resolve import resolve
from samplers.noise import noise
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, PROMPTS, SEED, SHORT, apart, draws, edited
from tests.stock_kandinsky import SIZE, STEPS, Stock, stock_of
from tests.tiny import WIDTH
from tests.tiny_kandinsky import BETAS, KINDS, VERSIONS

NEGATIVE = ["blue", "a white square on black"]


@pytest.fixture(scope="module")
def folders(kandinsky_folders: dict[str, dict[str, Path]]) -> dict[str, dict[str, Path]]:
    return kandinsky_folders


@pytest.fixture(scope="module")
def models(kandinskys: dict[str, TextToImage]) -> dict[str, TextToImage]:
    return kandinskys


@pytest.fixture(scope="module")
def stocks(folders: dict[str, dict[str, Path]]) -> dict[str, Stock]:
    return {version: stock_of(version, each) for version, each in folders.items()}


# --- the same pictures ----------------------------------------------------------------------------------------------


def assert_same(model: TextToImage, stock: Stock, prompts: list[str], n: int, **asked: Any) -> None:
    """From words to final latents and pictures, every stage by stock's own pipeline."""
    negative, prior_guidance = asked.pop("negative", None), asked.pop("prior_guidance_scale", 4.0)
    embeds = stock.embeds(prompts, n, negative, prior_guidance)
    latents, pictures = stock.paint(embeds, prompts, n, negative, **asked)
    ours: dict[str, Any] = {"negative_prompt": negative, "prior_guidance_scale": prior_guidance, "seed": SEED}
    ours |= {"num_images_per_prompt": n, "rerank": False, **SIZE, **STEPS, **asked}
    finished = model(prompts, output_type="latent", **ours).images
    assert isinstance(finished, Tensor) and apart(finished, latents) <= LATENTS
    with torch.no_grad():
        painted = as_output(list(model.model.decode(finished)), "pil")
    assert isinstance(painted, list) and len(painted) == len(pictures) == len(prompts) * n
    assert max(largest_difference(a, b) for a, b in zip(painted, pictures, strict=True)) <= EIGHT_BIT_LEVEL


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    "guided",
    [
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"guidance_scale": 3.0, "negative": NEGATIVE},
    ],
    ids=["unguided", "guided", "negative"],
)
def test_pictures_equal_stock(
    models: dict[str, TextToImage], stocks: dict[str, Stock], version: str, n: int, guided: dict[str, Any]
) -> None:
    assert_same(models[version], stocks[version], PROMPTS, n, **guided)


@pytest.mark.parametrize("version", VERSIONS)
def test_four_of_one_prompt_in_another_size(
    models: dict[str, TextToImage], stocks: dict[str, Stock], version: str
) -> None:
    assert_same(models[version], stocks[version], [LONG], 4, height=64, width=128, negative=["blue"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde"])
def test_another_sampler_equals_stocks_class(
    models: dict[str, TextToImage], stocks: dict[str, Stock], version: str, sampler: str
) -> None:
    """Built anew, since stock crashes with a class built from 2.2's configuration; ours takes either."""
    kinds = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
    options: dict[str, Any] = {"timestep_spacing": "leading"}
    options |= {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    options |= {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    if version == "2.1":
        options |= {"steps_offset": 1} | ({"set_alpha_to_one": False} if sampler == "ddim" else {})
    elif sampler == "ddpm":
        options |= {"variance_type": "learned_range"}
    scheduler = kinds[sampler.removesuffix("_sde")](**BETAS, **options)
    decoder = type(stocks[version].decoder)(**{**stocks[version].decoder.components, "scheduler": scheduler})
    decoder.set_progress_bar_config(disable=True)
    embeds, null = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    theirs, _ = replace(stocks[version], decoder=decoder).paint((embeds, null), PROMPTS)
    ours: dict[str, Any] = {"image_embeds": embeds, "negative_image_embeds": null, "sampler": sampler}
    ours |= {"seed": SEED, "rerank": False, "output_type": "latent", **SIZE}
    painted = models[version](PROMPTS, num_inference_steps=STEPS["num_inference_steps"], **ours).images
    assert apart(painted, theirs) <= LATENTS


@pytest.mark.parametrize("version", VERSIONS)
def test_the_reference_can_fail(models: dict[str, TextToImage], version: str) -> None:
    """Words, both guidances, negative prompt and start all show, so that equality above says something."""
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "rerank": False, **SIZE, **STEPS}
    plain = models[version](SHORT, **asked).images
    others: list[dict[str, Any]] = [{"guidance_scale": 1.0}, {"prior_guidance_scale": 1.0}, {"seed": 1}]
    others += [{"negative_prompt": "blue"}, {"negative_prompt": "blue", "guidance_scale": 1.0}]
    for other in others:
        assert apart(plain, models[version](SHORT, **(asked | other)).images) > 1e-3, other
    assert apart(plain, models[version](LONG, **asked).images) > 1e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_noise_that_is_handed_in_is_the_seeds(models: dict[str, TextToImage], version: str) -> None:
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "rerank": False, **SIZE, **STEPS}
    start, prior_start = noise([SEED], "decoder", 0, (4, 8, 8)), noise([SEED], "prior", 0, (WIDTH,))
    plain = models[version](SHORT, **asked).images
    assert torch.equal(plain, models[version](SHORT, latents=start, prior_latents=prior_start, **asked).images)
    assert apart(plain, models[version](SHORT, latents=-start, **asked).images) > 1e-2


@pytest.mark.parametrize("version", VERSIONS)
def test_pictures_do_not_depend_on_who_is_beside_them(models: dict[str, TextToImage], version: str) -> None:
    """Rows of the prior for prompts and for negative prompts, of several requests, let in a few at a time."""
    common: dict[str, Any] = {"output_type": "pt", "rerank": False, **SIZE, **STEPS}
    requests = [
        Request(prompt=LONG, negative_prompt="blue", num_images_per_prompt=2, seed=3, **common),
        Request(prompt=SHORT, seed=4, **common),
        Request(prompt=SHORT, negative_prompt="blue", guidance_scale=1.0, seed=5, **common),
        Request(
            prompt=SHORT, image_embeds=torch.ones(1, WIDTH), seed=6, **(common | {"prior_num_inference_steps": None})
        ),
    ]
    model = models[version]
    together = model.paint(requests)
    for request, result in zip(requests, together, strict=True):
        alone = model.paint([request], batch_size=1)[0]
        assert (alone.images - result.images).abs().max() <= 1 / 255
    evaluations = [result.account.evaluations["prior"] for result in together]
    steps = STEPS["prior_num_inference_steps"]
    # two of each step where the prior is guided, one for a negative prompt, which unguided pictures need none of
    assert evaluations == [2 * 3 * steps, 2 * steps, 2 * steps, 0]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_in_place_of_words(models: dict[str, TextToImage], stocks: dict[str, Stock], version: str) -> None:
    """By the prior's own image tower, as stock's image processor hands it over."""
    model, prior = models[version], stocks[version].prior
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "rerank": False, "num_inference_steps": 2, **SIZE}
    (picture,) = model(SHORT, seed=7, rerank=False, **SIZE, **STEPS).images
    with torch.no_grad():
        pixels = prior.image_processor(picture, return_tensors="pt").pixel_values
        embeds = prior.image_encoder(pixels).image_embeds
    seen, embedded = model(variation_of=picture, **asked).images, model(image_embeds=embeds, **asked).images
    assert apart(seen, embedded) <= LATENTS


def test_the_best_of_a_priors_answers_has_one_null(models: dict[str, TextToImage]) -> None:
    asked: dict[str, Any] = {"seed": SEED, "output_type": "latent", "rerank": False, **SIZE, **STEPS}
    result = models["2.2"](SHORT, negative_prompt="blue", prior_best_of=3, **asked)
    assert result.account.evaluations["prior"] == (2 * 3 + 1) * STEPS["prior_num_inference_steps"]


# --- a decoder alone, and a prior beside it --------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_two_folders_are_the_folder_of_both(
    models: dict[str, TextToImage], folders: dict[str, dict[str, Path]], version: str, tmp_path: Path
) -> None:
    two = TextToImage.from_pretrained(folders[version]["decoder"], device="cpu", prior_model=folders[version]["prior"])
    assert two.hash == models[version].hash
    asked: dict[str, Any] = {"seed": 2, "num_images_per_prompt": 3, **SIZE, **STEPS}
    ours, theirs = two(SHORT, **asked), models[version](SHORT, **asked)
    assert ours.seeds == theirs.seeds and ours.scores == theirs.scores
    assert ours.records[0]["prior_model"] == str(folders[version]["prior"]) and "prior_model" not in theirs.records[0]
    index = json.loads((two.save(tmp_path / "saved") / "model_index.json").read_text())
    assert index == json.loads((folders[version]["combined"] / "model_index.json").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_decoder_alone_takes_embeddings(
    stocks: dict[str, Stock], folders: dict[str, dict[str, Path]], version: str, tmp_path: Path
) -> None:
    decoder = TextToImage.from_pretrained(folders[version]["decoder"], device="cpu")
    embeds, null = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(2))
    asked: dict[str, Any] = {"output_type": "latent", "seed": SEED, "num_inference_steps": 4, **SIZE}
    ours = decoder(PROMPTS, image_embeds=embeds, negative_image_embeds=null, **asked).images
    assert apart(ours, stocks[version].paint((embeds, null), PROMPTS)[0]) <= LATENTS
    unguided = decoder(PROMPTS, image_embeds=embeds, guidance_scale=1.0, **asked).images
    assert apart(unguided, stocks[version].paint((embeds, null), PROMPTS, guidance_scale=1.0)[0]) <= LATENTS
    for wrong, message in (
        ({"prompt": SHORT}, "paints nothing from a text alone; give image_embeds, or load it with prior_model=NAME"),
        ({"image_embeds": embeds}, "no image to be guided away from; give negative_image_embeds, or guidance_scale=1"),
        ({"image_embeds": embeds[:, 1:], "guidance_scale": 1.0}, "image_embeds has shape"),
        ({"image_embeds": embeds, "negative_image_embeds": null[:1]}, "negative_image_embeds has shape"),
        ({"image_embeds": embeds, "guidance_scale": 1.0, "clip_skip": 1}, "clip_skip was given"),
        ({"image_embeds": embeds, "guidance_scale": 1.0, "prompt_embeds": embeds}, "prompt_embeds was given"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            decoder(**wrong)
        assert "\n" not in str(caught.value)
    index = json.loads((decoder.save(tmp_path / "saved") / "model_index.json").read_text())
    assert index == json.loads((folders[version]["decoder"] / "model_index.json").read_text())


def test_what_nobody_reads_is_said(models: dict[str, TextToImage]) -> None:
    """Without the prior, 2.2 has nobody to read a negative prompt; 2.1 has."""
    asked: dict[str, Any] = {"image_embeds": torch.ones(1, WIDTH), "negative_prompt": "blue", "num_inference_steps": 1}
    with pytest.warns(UserWarning, match="negative_prompt is ignored: the prior is off"):
        resolve(Request(**asked), models["2.2"].model.abilities)
    resolve(Request(**asked), models["2.1"].model.abilities)
    with pytest.raises(ValueError, match=r"without its prior .*; leave prior=False out"):
        resolve(Request(prompt=SHORT, prior=False), models["2.2"].model.abilities)
    resolve(Request(prompt=SHORT, negative_prompt="blue", guidance_scale=1.0), models["2.2"].model.abilities)


# --- what stock cannot do; the day one of these fails, compare with stock above --------------------------------------


def embeddings(count: int) -> dict[str, Any]:
    made = torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(0))
    return {"image_embeds": made[0], "negative_image_embeds": made[1], "num_inference_steps": 1, **SIZE}


@pytest.mark.parametrize("version", VERSIONS)
def test_stocks_faults(stocks: dict[str, Stock], version: str) -> None:
    decoder, prior = stocks[version].decoder, stocks[version].prior
    words = {"prompt": [SHORT]} if version == "2.1" else {}
    with pytest.raises(RuntimeError, match="must match"):  # several pictures without guidance
        decoder(**words, **embeddings(1), num_images_per_prompt=2, guidance_scale=1.0)
    pixels = decoder(**words, **embeddings(1), output_type="pt", generator=draws("decoder", [0])).images
    assert pixels.min() < 0  # "pt" is not brought into [0, 1]
    with pytest.raises(IndexError):  # one generator for each picture, and a negative prompt
        prior(PROMPTS, negative_prompt=NEGATIVE, generator=draws("prior", [0, 1]), num_inference_steps=2)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_combined_pipelines_faults(
    folders: dict[str, dict[str, Path]], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = KINDS[version, False][2].from_pretrained(folders[version]["combined"])
    both.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="Unexpected latents shape"):  # handed to the prior
        both(SHORT, latents=torch.zeros(1, 4, 8, 8), prior_num_inference_steps=2)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(both, "decoder_pipe", lambda **kwargs: asked.append(kwargs) or SimpleNamespace(images=[]))
    both(PROMPTS, negative_prompt=NEGATIVE, num_images_per_prompt=2, prior_num_inference_steps=2)
    assert "negative_prompt" not in asked[0]
    if version == "2.1":  # the embeddings lie prompt by prompt
        assert asked[0]["prompt"] == PROMPTS * 2


def test_stock_crashes_with_another_scheduler_of_2_2s_configuration(stocks: dict[str, Stock]) -> None:
    decoder = stocks["2.2"].decoder
    scheduler = DDIMScheduler.from_config(decoder.scheduler.config)
    other = type(decoder)(**{**decoder.components, "scheduler": scheduler})
    with pytest.raises(RuntimeError, match="must match the size"):
        other(**embeddings(1))


# --- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_the_priors_towers_rank(models: dict[str, TextToImage], stocks: dict[str, Stock], version: str) -> None:
    result = models[version](LONG, num_images_per_prompt=4, keep=2, seed=3, search="halving", **SIZE, **STEPS)
    assert result.scores is not None and result.scores == sorted(result.scores, reverse=True)
    prior = stocks[version].prior
    ids = prior.tokenizer([LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = prior.text_encoder(ids).text_embeds
        pixels = prior.image_processor(result.images, return_tensors="pt").pixel_values
        images = prior.image_encoder(pixels).image_embeds
    assert result.scores == pytest.approx(cosine_similarity(images, text).tolist(), abs=1e-4)


# --- what lies on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_what_we_save_stock_paints_the_same(models: dict[str, TextToImage], version: str, tmp_path: Path) -> None:
    folder = models[version].save(tmp_path / "saved")
    assert not (folder / "clip").exists()  # it is the prior's own
    both = KINDS[version, False][2].from_pretrained(folder)
    assert_same(models[version], Stock.of(version, both.decoder_pipe, both.prior_pipe), [SHORT], 1, negative=["blue"])


@pytest.mark.parametrize("version", VERSIONS)
def test_info_tells_family_parts_and_sizes(folders: dict[str, dict[str, Path]], version: str) -> None:
    for name, kind in zip(("decoder", "prior", "combined"), KINDS[version, False], strict=True):
        facts = facts_of(str(folders[version][name]))
        index = json.loads((folders[version][name] / "model_index.json").read_text())
        assert facts["family"] == kind.__name__
        assert set(facts["parts"]) == {part for part in index if not part.startswith("_")}
        assert facts["parameters"] > 0


def test_the_command_line_takes_the_prior(
    folders: dict[str, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = folders["2.2"]
    argv = ["generate", SHORT, "-n", "2", "--steps", "2", "--prior-steps", "2", "--width", "64", "--height", "64"]
    argv += ["--model", str(of["decoder"]), "--prior-model", str(of["prior"]), "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    path = json.loads(capsys.readouterr().out)["pictures"][0]["path"]
    assert main(["reproduce", path, "--json"]) == 0
    assert main(["generate", SHORT, "--model", str(of["decoder"]), "--out", str(tmp_path / "other")]) == 2
    assert "load it with --prior-model NAME" in capsys.readouterr().err


@pytest.fixture
def copy(folders: dict[str, dict[str, Path]], tmp_path: Path) -> dict[str, Path]:
    names = ("decoder", "prior")
    return {name: Path(shutil.copytree(folders["2.1"][name], tmp_path / name)) for name in names}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder/unet/config.json", {"addition_embed_type": "image"}, "unet"),
        ("decoder/scheduler/scheduler_config.json", {"prediction_type": "v"}, "prediction_type='v' is not supported"),
        ("decoder/model_index.json", {"movq": [None, None]}, "movq' is missing from model_index.json"),
        ("prior/model_index.json", {"image_encoder": [None, None]}, "image_encoder' is missing from model_index.json"),
        ("prior/tokenizer/tokenizer_config.json", {"model_max_length": 20}, "num_embeddings is 32, .* need 20"),
        ("prior/model_index.json", {"_class_name": "KandinskyV22PriorPipeline"}, "needs a KandinskyPriorPipeline"),
    ],
)
def test_what_does_not_fit_is_refused(
    copy: dict[str, Path], name: str, change: dict[str, object], message: str
) -> None:
    edited(copy["decoder"].parent / name, **change)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(copy["decoder"], device="cpu", prior_model=copy["prior"])
    assert "\n" not in str(caught.value)


def test_a_prior_in_the_wrong_place_is_refused(folders: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    of = folders["2.2"]
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for model, prior, message in (
        (of["prior"], None, "is a prior alone; give it as prior_model, beside a KandinskyV22Pipeline"),
        (of["combined"], of["prior"], "has its own prior; leave it out"),
        (of["decoder"], of["decoder"], "is a KandinskyV22Pipeline; .* needs a KandinskyV22PriorPipeline"),
        ("shapes64", of["prior"], "has its own prior; leave it out"),
        (tmp_path, of["prior"], "is a StableDiffusionPipeline, which takes none"),
        (of["decoder"], of["prior"] / "nowhere", "nowhere' is unknown"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TextToImage.from_pretrained(model, device="cpu", prior_model=prior)
        assert "\n" not in str(caught.value)


def test_pictures_of_np_are_those_of_pil(models: dict[str, TextToImage]) -> None:
    asked: dict[str, Any] = {"seed": 1, "rerank": False, **SIZE, **STEPS}
    whole = models["2.2"](SHORT, output_type="np", **asked).images
    assert isinstance(whole, np.ndarray) and whole.min() >= 0 and whole.max() <= 1
    (picture,) = models["2.2"](SHORT, **asked).images
    assert np.array_equal((whole[0] * 255).round().astype(np.uint8), np.asarray(picture))
