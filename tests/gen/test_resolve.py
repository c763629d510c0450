"""Every mistake a user can make is one clear line, and is made before any network runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from gen import Request, TextToImage
from gen.candidate import MAX_SEED
from gen.resolve import candidate_seeds, resolve
from gen.settings import Settings
from tests.tiny import WIDTH, make_tiny_stable_unclip

GOOD = {"prompt": "a red circle"}
EMBEDS = torch.zeros(1, 32, WIDTH)

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": ["a star", ""]}, "prompt is empty"),
    ({"prompt": []}, "empty list"),
    ({"prompt": [3]}, "prompt is 3"),
    ({"prompt": 3}, "prompt is 3"),
    ({"num_images_per_prompt": 2**33}, "num_images_per_prompt=8589934592 is more than one request takes; give at most"),
    ({"prompt": ["a"] * 4, "num_images_per_prompt": 250_001}, "of 4 prompts is more than one .* at most 250000"),
    ({"prompt": ["a"] * 1_000_001}, "1000001 prompts are more than one request takes; give at most 1000000"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": None, "image_embeds": 3}, "must be a tensor"),
    ({"prompt": None, "prompt_embeds": torch.zeros(0, 32, WIDTH)}, "must be a tensor of one or more"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 .* 1 or more"),
    ({"keep": 5, "num_images_per_prompt": 4}, "keep=5 is more than num_images_per_prompt=4"),
    ({"keep": 0}, "keep=0 .* 1 or more"),
    ({"keep": 1, "num_images_per_prompt": 2, "rerank": False}, "keep=1 of 2 needs a ranking.*rerank=False"),
    ({"rerank": True, "prompt": None, "image_embeds": torch.zeros(1, WIDTH)}, "needs the prompt as text"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 .* from 1 to 1000"),
    ({"num_inference_steps": 1001}, "from 1 to 1000"),
    ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is of type float; give a whole number from 1 to 1000"),
    ({"num_inference_steps": 2.0}, "num_inference_steps=2.0 is of type float; give a whole number"),
    ({"num_inference_steps": np.float32(2)}, "num_inference_steps=2.0 is of type float"),
    ({"num_inference_steps": True}, "num_inference_steps=True is of type bool; give a whole number"),
    ({"num_inference_steps": torch.tensor(True)}, "num_inference_steps=True is of type bool"),
    ({"num_inference_steps": "3"}, "num_inference_steps='3' is of type str; give a whole number"),
    ({"num_inference_steps": [9] * 999}, r"num_inference_steps=\[9, .*\.\.\. is of type list; give a whole number"),
    ({"keep": torch.tensor([1])}, r"keep is of type Tensor and shape \(1,\); give a number"),
    ({"denoising_end": torch.ones(2)}, r"denoising_end is of type Tensor and shape \(2,\); give a number"),
    ({"seed": np.arange(2)}, r"seed is of type ndarray and shape \(2,\); give a whole number"),
    ({"guidance_scale": np.float32(0.5)}, "guidance_scale=0.5 is out of range"),
    ({"guidance_scale": 10**400}, "guidance_scale=1000.* is out of range"),
    ({"guidance_scale": "2"}, "guidance_scale='2' is of type str; give a number of 1 or more"),
    ({"prior_num_inference_steps": 0}, "prior_num_inference_steps=0 .* from 1 to 1000"),
    ({"height": 60}, "height=60 cannot be halved .* multiple of 8, such as 56"),
    ({"width": 0}, "width=0 .* from 1 to 16384"),
    ({"sampler": "eular"}, "sampler 'eular' is unknown; choose from: ddim, ddpm, deis, .*heun"),
    ({"guidance_scale": 0.5}, r"guidance_scale=0.5 .* 1 or more \(1 turns guidance off\)"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"prior_guidance_scale": -1}, "prior_guidance_scale=-1"),
    ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 .* from 0 to 1"),
    ({"guidance_interval": (3.0, 1.0)}, "upside down"),
    ({"guidance_interval": (3.0,)}, "not a pair"),
    ({"guidance_interval": 3.0}, "not a pair"),
    ({"guidance_interval": ("low", 3.0)}, "guidance_interval='low'"),
    ({"eta": 2.0}, "eta=2.0 .* from 0 to 1"),
    ({"eta": 0.5, "sampler": "heun"}, "eta=0.5, but sampler 'heun' takes none; choose from: ddim"),
    ({"s_churn": -1, "sampler": "euler"}, "s_churn=-1 .* 0 or more"),
    ({"s_tmax": float("inf"), "sampler": "euler"}, "s_tmax=inf"),
    ({"s_noise": "x", "sampler": "heun"}, "s_noise='x'"),
    ({"s_churn": 2.0}, "s_churn=2.0, but sampler 'ddim' takes none; choose from: euler, heun"),
    ({"s_tmin": 3.0, "s_tmax": 1.0, "s_churn": 1, "sampler": "heun"}, "s_tmin=3.0 is above s_tmax=1.0"),
    ({"s_churn": 2.0, "eta": 0.5, "sampler": "euler"}, "eta=0.5 and s_churn=2.0 were both given.*set one of them to 0"),
    ({"guidance_rule": "apq"}, "guidance_rule 'apq' is unknown; choose from: cfg, cfg_zero, apg"),
    ({"guidance_rule": "autoguidance"}, "autoguidance needs a weaker UNet; load the model with weak_unet=FOLDER"),
    ({"guidance_rule": 3}, "guidance_rule '3' is unknown"),
    ({"zero_init_steps": 5}, "zero_init_steps=5 .* from 0 to 4"),
    ({"apg_eta": 2}, "apg_eta=2 .* from 0 to 1"),
    ({"apg_norm_threshold": -1.0}, "apg_norm_threshold=-1.0 .* 0 or more"),
    ({"apg_momentum": 1.5}, "apg_momentum=1.5 .* from -1 to 1"),
    ({"clip_guidance_scale": -1}, "clip_guidance_scale=-1 .* 0 or more"),
    (
        {"clip_guidance_scale": 9.0, "prompt": None, "prior": False, "prompt_embeds": EMBEDS},
        "clip_guidance_scale needs the prompt as text",
    ),
    ({"thresholding": -1}, "thresholding=-1 .* 0 or more"),
    ({"dynamic_thresholding_ratio": 0.0}, "dynamic_thresholding_ratio=0 is out of range; give a share above 0"),
    ({"dynamic_thresholding_ratio": 99.5}, "dynamic_thresholding_ratio=99.5 .* from 0 to 1"),
    ({"clip_skip": 2}, "clip_skip=2 .* from 0 to 1"),
    ({"noise_level": 1000}, "noise_level=1000 .* from 0 to 999"),
    ({"noise_level": -1}, "noise_level=-1"),
    ({"prior": "yes"}, "prior='yes'"),
    ({"seed": -1}, "seed=-1 .* from 0 to 4294967295"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"seed": MAX_SEED, "num_images_per_prompt": 2}, "from 0 to 4294967294"),
    ({"seed": [1, 2]}, "seed has 2 numbers for 1 prompt; give one"),
    ({"seed": 1.5}, "seed=1.5 .* whole number"),
    ({"seed": "x"}, "seed='x' .* whole number"),
    ({"output_type": "jpg"}, "output_type 'jpg' is unknown; choose from: pil, pt, np, latent"),
    ({"latents": torch.zeros(1, 4, 4, 8)}, r"latents has shape \(1, 4, 4, 8\); give \(1, 4, 8, 8\)"),
    ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents has numbers that are not finite"),
    ({"latents": [1]}, "latents is a list"),
    ({"prior_latents": torch.zeros(2, WIDTH)}, "prior_latents has shape"),
    ({"image_embeds": torch.zeros(1, 3)}, "image_embeds has shape"),
    ({"negative_image_embeds": torch.zeros(1, WIDTH)}, "negative_image_embeds was given, but .* away from a text"),
    ({"image_embeds": torch.zeros(1, WIDTH), "prior": True}, "prior=True and image_embeds"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 32, WIDTH)}, "prior reads the prompt as text"),
    ({"prompt_embeds": torch.zeros(1, 32, 3)}, "prompt_embeds has shape"),
    ({"prompt_embeds": torch.zeros(1, 20, WIDTH)}, "prompt_embeds has shape"),
    ({"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, 1:]}, "negative_prompt_embeds has shape"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompt; give one"),
    ({"negative_prompt": [1]}, "negative_prompt is 1"),
    ({"negative_prompt": 1}, "negative_prompt is 1"),
    ({"prompt_embeds": [1], "negative_prompt_embeds": EMBEDS}, "prompt_embeds is a list"),
    ({"negative_prompt": "a", "negative_prompt_embeds": EMBEDS}, "both given"),
]


@contextmanager
def no_networks(painter: TextToImage) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise AssertionError("a network ran before the request was checked")

    model = painter.model
    assert model.prior is not None and model.clip is not None
    modules = [model.unet, model.vae, model.text.encoder, model.prior.network, model.clip.model]
    hooks = [module.register_forward_pre_hook(refuse) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def no_network_runs(tiny: TextToImage) -> Iterator[None]:
    with no_networks(tiny):
        yield


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes(tiny: TextToImage, no_network_runs: None, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny(**(GOOD | words))
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers(tiny: TextToImage) -> None:
    words = {
        "seed": [np.int64(3)],
        "num_images_per_prompt": np.int32(2),
        "keep": torch.tensor(1),
        "height": np.array(64),
        "num_inference_steps": torch.tensor(4),
        "guidance_scale": np.float32(2.5),
        "guidance_interval": (np.float64(0.5), Fraction(5, 2)),
        "budget": torch.tensor(60.0),
        "prior": np.True_,
    }
    job = resolve(Request(**GOOD | words), tiny.model.abilities)
    assert [each.seed for each in job.candidates] == [3, 4] and job.keep == 1 and job.budget == 60.0
    record = json.loads(json.dumps(job.candidates[0].to_json()))  # a record is JSON
    here = {"height": 64, "num_inference_steps": 4, "guidance_scale": 2.5, "guidance_interval": [0.5, 2.5]}
    assert record["seed"] == 3 and here.items() <= record["settings"].items()
    settings = job.candidates[0].settings
    assert {type(settings.height), type(settings.num_inference_steps), type(job.keep)} == {int}
    assert {type(settings.guidance_scale), type(job.budget)} == {float} and settings.prior is True


def test_what_is_no_callback_and_no_request(tiny: TextToImage, no_network_runs: None) -> None:
    message = "callback=3 is of type int; give a function"
    with pytest.raises(ValueError, match=message):
        tiny("a star", callback=3, progress=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'stps'"):
        tiny("a star", stps=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="request is of type str; give a Request"):
        tiny.paint(["a star"])  # type: ignore[list-item]
    with tiny.engine() as engine:
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(**GOOD), callback=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="request is of type str; give a Request"):
            engine.submit("a star")  # type: ignore[arg-type]


def test_batch_size_below_one(tiny: TextToImage, no_network_runs: None) -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        tiny("a star", batch_size=0)


def test_a_sampler_that_the_checkpoint_cannot_be_read_as(tmp_path: Path) -> None:
    stock = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    stock.register_to_config(thresholding=True)  # which is nothing to Euler
    model = TextToImage.from_pretrained(make_tiny_stable_unclip(tmp_path / "model", scheduler=stock), device="cpu")
    with no_networks(model), pytest.raises(ValueError, match="as ddim: thresholding=True is not supported"):
        model("a star", sampler="ddim")


def test_one_bad_request_refuses_all(tiny: TextToImage, no_network_runs: None) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny.paint([Request(prompt="a star"), Request(prompt="")])


def test_no_network_runs_is_able_to_fail(tiny: TextToImage, no_network_runs: None) -> None:
    with pytest.raises(AssertionError, match="a network ran"):
        tiny("a star")


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "negative_prompt"),
        ({"prior": False, "prior_guidance_scale": 2.0}, "prior_guidance_scale"),
        ({"prior": False, "noise_level": 5}, "noise_level"),
        ({"prior": False, "prior_num_inference_steps": 5}, "prior_num_inference_steps"),
        ({"prompt_embeds": EMBEDS, "clip_skip": 1}, "clip_skip"),
        ({"sampler": "euler", "s_tmin": 0.1}, "s_tmin"),
        ({"guidance_scale": 1.0, "guidance_rule": "apg"}, "guidance_rule"),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.7}, "guidance_rescale"),
        ({"guidance_rule": "apg", "zero_init_steps": 1}, "zero_init_steps"),
        ({"guidance_rule": "cfg_zero", "apg_momentum": 0.1}, "apg_momentum"),
        ({"dynamic_thresholding_ratio": 0.9}, "dynamic_thresholding_ratio"),
        ({"sampler": "euler", "s_churn": 0, "s_noise": 1.1}, "s_noise"),
    ],
)
def test_what_is_ignored_is_said(tiny: TextToImage, words: dict[str, Any], ignored: str) -> None:
    with pytest.warns(UserWarning, match=f"{ignored} is ignored") as caught:
        resolve(Request(**(GOOD | words)), tiny.model.abilities)
    assert {each.filename for each in caught} == {__file__}  # of who asks


def test_a_model_without_prior_or_clip_says_so(tiny: TextToImage) -> None:
    abilities = replace(tiny.model.abilities, prior_max_steps=0, can_rank=False)
    with pytest.raises(ValueError, match="has no prior"):
        resolve(Request(prompt="a star", prior=True), abilities)
    plain = replace(abilities, defaults=replace(abilities.defaults, prior=False))
    with pytest.raises(ValueError, match="no clip/ to rank with"):
        resolve(Request(prompt="a star", rerank=True), plain)
    with pytest.raises(ValueError, match="keep=1 of 2 needs a ranking"):
        resolve(Request(prompt="a star", keep=1, num_images_per_prompt=2), plain)
    with pytest.raises(ValueError, match="no clip/ to guide by"):
        resolve(Request(prompt="a star", clip_guidance_scale=9.0), plain)
    assert resolve(Request(prompt="a star"), plain).rank is False


def test_seeds() -> None:
    assert candidate_seeds(5, 2, 3) == (5, 6, 7, 5, 6, 7)
    assert candidate_seeds([5, 1], 2, 2) == (5, 6, 1, 2)
    assert candidate_seeds(MAX_SEED, 1, 1) == (MAX_SEED,)
    drawn = candidate_seeds(None, 2, 3)
    assert drawn[:3] == drawn[3:] and drawn[1] == drawn[0] + 1 and 0 <= drawn[0] <= MAX_SEED - 2
    assert len({candidate_seeds(None, 1, 1) for _ in range(8)}) > 1


def test_drawing_a_seed_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    candidate_seeds(None, 1, 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_eta_and_churn_go_together_where_one_is_0(tiny: TextToImage) -> None:
    for options in ({"eta": 0.0, "s_churn": 2.0}, {"eta": 0.5, "s_churn": 0.0}):
        job = resolve(Request(prompt="a star", sampler="euler", **options), tiny.model.abilities)
        assert job.candidates[0].settings.sampler_options == options


def test_options_of_the_models_own_sampler_are_not_anothers(tiny: TextToImage) -> None:
    own = replace(tiny.model.abilities.defaults, sampler="euler", s_churn=3.0, s_noise=1.1)
    abilities = replace(tiny.model.abilities, defaults=own)
    given = {"s_churn": 3.0, "s_noise": 1.1}
    assert resolve(Request(prompt="a star"), abilities).candidates[0].settings.sampler_options == given
    assert resolve(Request(prompt="a star", sampler="ddim"), abilities).candidates[0].settings.sampler_options == {}


def test_settings_defaults_are_the_models_own(tiny: TextToImage) -> None:
    settings = resolve(Request(prompt="a star"), tiny.model.abilities).candidates[0].settings
    assert settings == Settings(
        height=64,
        width=64,
        num_inference_steps=4,  # unclip.json
        guidance_scale=3.0,
        prior=True,
        prior_num_inference_steps=3,
        prior_guidance_scale=4.0,  # stock's
        sampler="ddim",  # scheduler_config.json
    )
