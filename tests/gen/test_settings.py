"""Samplers' options and guidance rules as settings: by hand from their papers, the same in any batch, and recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from gen import Request, TextToImage
from samplers.noise import noise
from tests.attention import apart
from tests.pictures import LEVEL
from tests.tiny import WIDTH, tiny_unet

SHAPE, SEED, SCALE = (4, 8, 8), 3, 5.0
ASKED: dict[str, Any] = {"seed": SEED, "prior": False, "rerank": False, "guidance_scale": SCALE}
ASKED |= {"num_inference_steps": 5, "sampler": "euler"}

Rule = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
"""rule(prompt's estimate of x0, null's, x, sigma, step) -> the guided estimate; all (1, C, h, w)"""


def cfg(prompt: Tensor, null: Tensor, x: Tensor, sigma: float, step: int) -> Tensor:
    return null + SCALE * (prompt - null)


class Painter:
    """The tiny model (v prediction) asked by hand for one picture of "a star"."""

    def __init__(self, model: TextToImage) -> None:
        self.model = model.model
        self.unet = model.model.unet
        self.words, self.null = (self.model.text([text]).tokens for text in ("a star", ""))

    def x0(self, x: Tensor, sigma: float, tokens: Tensor) -> Tensor:
        """Salimans & Ho 2022: x0 = alpha z - sigma_vp v of z = alpha x, alpha = 1 / sqrt(1 + sigma^2)."""
        alpha = 1 / math.sqrt(1 + sigma**2)
        timestep = self.model.levels.scaling.timestep(torch.tensor([sigma]))
        v = self.unet(alpha * x, timestep, tokens, class_labels=torch.zeros(1, 2 * WIDTH)).sample
        return alpha * (alpha * x) - sigma * alpha * v

    def guided(self, x: Tensor, sigma: float, rule: Rule, step: int) -> Tensor:
        return rule(self.x0(x, sigma, self.words), self.x0(x, sigma, self.null), x, sigma, step)

    @torch.no_grad()
    def paint(self, rule: Rule = cfg, *, heun: bool = False, churn: dict[str, float] | None = None) -> Tensor:
        """Latents by Karras et al. 2022, Algorithm 2, line by line; their noise is block i + 1 of the seed's stream."""
        asked = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0} | (churn or {})
        schedule = self.model.levels.schedule("heun" if heun else "euler", 5)
        t = schedule.sigmas.tolist()
        x = noise([SEED], "decoder", 0, SHAPE) * schedule.start_scale
        for i in range(len(t) - 1):
            held = asked["s_tmin"] <= t[i] <= asked["s_tmax"]
            gamma = min(asked["s_churn"] / (len(t) - 1), math.sqrt(2) - 1) if held else 0.0
            raised = t[i] + gamma * t[i]
            eps = asked["s_noise"] * noise([SEED], "decoder", i + 1, SHAPE)
            x = x + math.sqrt(raised**2 - t[i] ** 2) * eps
            slope = (x - self.guided(x, raised, rule, i)) / raised
            moved = x + (t[i + 1] - raised) * slope
            if heun and t[i + 1] > 0:
                second = (moved - self.guided(moved, t[i + 1], rule, i)) / t[i + 1]
                moved = x + (t[i + 1] - raised) * (slope + second) / 2
            x = moved
        return x * schedule.end_scale


def latents(model: TextToImage, **asked: Any) -> Tensor:
    images = model("a star", **(ASKED | {"output_type": "latent"} | asked)).images
    assert isinstance(images, Tensor)
    return images


# --- churn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("churn", [{"s_churn": 2.0}, {"s_churn": 9.0, "s_tmin": 0.5, "s_tmax": 8.0, "s_noise": 1.01}])
def test_churn_is_karras_algorithm_2(tiny: TextToImage, sampler: str, churn: dict[str, float]) -> None:
    ours = latents(tiny, sampler=sampler, **churn)
    assert apart(ours, Painter(tiny).paint(heun=sampler == "heun", churn=churn)) < 1e-4
    assert apart(latents(tiny, sampler=sampler), Painter(tiny).paint(heun=sampler == "heun")) < 1e-4
    assert apart(ours, latents(tiny, sampler=sampler)) > 1e-2


# --- guidance ----------------------------------------------------------------------------------------------------


def cfg_zero(zero_init_steps: int) -> Rule:
    """Fan et al. 2025, Algorithm 1, on the network's own output (v): v = s* v_null + w (v_prompt - s* v_null)."""

    def rule(prompt: Tensor, null: Tensor, x: Tensor, sigma: float, step: int) -> Tensor:
        alpha = 1 / math.sqrt(1 + sigma**2)
        towards, away = ((alpha**2 * x - x0) / (sigma * alpha) for x0 in (prompt, null))
        star = (towards * away).sum() / (away**2).sum()
        v = star * away + SCALE * (towards - star * away)
        v = torch.zeros_like(v) if step < zero_init_steps else v
        return alpha**2 * x - sigma * alpha * v

    return rule


def apg(eta: float, threshold: float, momentum: float) -> Rule:
    """Sadat et al. 2024, Algorithm 1: momentum, then the norm's limit, then the part along the prompt's estimate."""
    running = torch.zeros(1, *SHAPE)

    def rule(prompt: Tensor, null: Tensor, x: Tensor, sigma: float, step: int) -> Tensor:
        nonlocal running
        running = prompt - null + momentum * running
        difference = running * min(1.0, threshold / running.norm().item()) if threshold else running
        unit = prompt / prompt.norm()
        along = (difference * unit).sum() * unit
        return prompt + (SCALE - 1) * (difference - along + eta * along)

    return rule


def thresholded(bound: float, ratio: float) -> Rule:
    """Saharia et al. 2022, section 2.3, with another bound than 1."""

    def rule(*args: Any) -> Tensor:
        x0 = cfg(*args)
        s = max(torch.quantile(x0.abs().flatten(), ratio).item(), bound)
        return x0.clamp(-s, s) / s * bound

    return rule


RULES: dict[str, tuple[dict[str, Any], Callable[[], Rule]]] = {
    "CFG-Zero*": ({"guidance_rule": "cfg_zero"}, lambda: cfg_zero(0)),
    "zero-init": ({"guidance_rule": "cfg_zero", "zero_init_steps": 2}, lambda: cfg_zero(2)),
    "APG": ({"guidance_rule": "apg"}, lambda: apg(0.0, 15.0, -0.5)),
    "APG, of other settings": (
        {"guidance_rule": "apg", "apg_eta": 0.3, "apg_norm_threshold": 2.0, "apg_momentum": -0.75},
        lambda: apg(0.3, 2.0, -0.75),
    ),
    "APG without limits": (
        {"guidance_rule": "apg", "apg_eta": 1.0, "apg_norm_threshold": 0.0, "apg_momentum": 0.0},
        lambda: cfg,
    ),
    "thresholding": ({"thresholding": 1.5}, lambda: thresholded(1.5, 0.995)),
    "thresholding, at another ratio": (
        {"thresholding": 1.0, "dynamic_thresholding_ratio": 0.8},
        lambda: thresholded(1.0, 0.8),
    ),
}


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_papers(tiny: TextToImage, name: str, sampler: str) -> None:
    asked, rule = RULES[name]
    ours, plain = latents(tiny, sampler=sampler, **asked), latents(tiny, sampler=sampler)
    assert apart(ours, Painter(tiny).paint(rule(), heun=sampler == "heun")) < 1e-4
    assert apart(ours, plain) < 1e-4 if rule() is cfg else apart(ours, plain) > 2e-3


@pytest.mark.parametrize("name", ["CFG-Zero*", "zero-init", "APG"])
def test_a_rule_holds_within_the_interval_alone(tiny: TextToImage, name: str) -> None:
    asked, rule = RULES[name]
    sigmas = tiny.model.levels.schedule("euler", 5).sigmas.tolist()
    interval, ruled = (sigmas[4], sigmas[1]), rule()

    def within(prompt: Tensor, null: Tensor, x: Tensor, sigma: float, step: int) -> Tensor:
        return ruled(prompt, null, x, sigma, step) if interval[0] < sigma <= interval[1] else prompt

    ours = latents(tiny, guidance_interval=interval, **asked)
    assert apart(ours, Painter(tiny).paint(within)) < 1e-4
    assert apart(ours, latents(tiny, **asked)) > 1e-2


@pytest.fixture(scope="module")
def weak_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of other weights and fewer channels, which takes what the tiny one does."""
    folder = tmp_path_factory.mktemp("models") / "weak"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        UNet2DConditionModel.from_config(dict(tiny_unet().config) | {"block_out_channels": (4, 8)}).save_pretrained(
            folder
        )
    return folder


@pytest.fixture(scope="module")
def autoguided(tiny_folder: Path, weak_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_folder, device="cpu", weak_unet=weak_folder)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_autoguidance_is_away_from_a_weaker_network(autoguided: TextToImage, sampler: str) -> None:
    """Karras et al. 2024, equation 3: D = w D_1 - (w - 1) D_0, both told the same prompt."""
    weaker = Painter(autoguided)
    assert autoguided.model.weak is not None
    weaker.unet = autoguided.model.weak

    def away(prompt: Tensor, null: Tensor, x: Tensor, sigma: float, step: int) -> Tensor:
        return SCALE * prompt - (SCALE - 1) * weaker.x0(x, sigma, weaker.words)

    ours = latents(autoguided, guidance_rule="autoguidance", sampler=sampler)
    assert apart(ours, Painter(autoguided).paint(away, heun=sampler == "heun")) < 1e-4
    assert apart(ours, latents(autoguided, sampler=sampler)) > 1e-2


def test_autoguided_rows_share_a_batch_with_others(autoguided: TextToImage) -> None:
    rules = [
        {"guidance_rule": "autoguidance"},
        {},
        {"guidance_scale": 1.0},
        {"guidance_rule": "autoguidance", "seed": 9},
    ]
    shared = ASKED | {"prompt": "a star", "output_type": "pt"}
    asked = [Request(**(shared | rule)) for rule in rules]
    alone = [autoguided.paint([request])[0] for request in asked]
    assert [one.account.evaluations["decoder"] for one in alone] == [10, 10, 5, 10]
    for batch_size in (None, 2):
        for ours, other in zip(autoguided.paint(asked, batch_size=batch_size), alone, strict=True):
            assert (ours.images - other.images).abs().max() <= LEVEL


def test_autoguidance_is_recorded_with_its_network(
    autoguided: TextToImage, tiny: TextToImage, tiny_folder: Path, weak_folder: Path
) -> None:
    result = autoguided("a star", **(ASKED | {"output_type": "pt", "guidance_rule": "autoguidance"}))
    record = json.loads(json.dumps(result.records[0]))
    assert record["weak_unet"] == str(weak_folder) and len(record["weak_unet_hash"]) == 64
    assert (autoguided.repaint(record) - result.images[0]).abs().max() <= LEVEL
    with pytest.raises(ValueError, match="guidance_rule=autoguidance needs a weaker UNet"):
        tiny.repaint(record)
    other = TextToImage.from_pretrained(tiny_folder, device="cpu", weak_unet=tiny_folder / "unet")
    with pytest.raises(ValueError, match="guided by another weak_unet than"):
        other.repaint(record)


def test_a_weaker_network_that_does_not_fit_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^weak_unet: folder '.*nowhere' does not exist"):
        TextToImage.from_pretrained(tiny_folder, device="cpu", weak_unet=tmp_path / "nowhere")
    tiny_unet(None).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="projection_class_embeddings_input_dim is None, but the model's UNet has 32"):
        TextToImage.from_pretrained(tiny_folder, device="cpu", weak_unet=tmp_path / "plain")


def test_clip_guidance_is_the_gradient_of_clips_cosine(tiny: TextToImage) -> None:
    """Nichol et al. 2022, section 2.4, at the estimate: x0 + s sigma^2 / (1 + sigma^2) d cos / d x0."""
    painter, strength = Painter(tiny), 0.5
    clip = painter.model.clip
    assert clip is not None
    text = clip.text("a star").embedding

    @torch.enable_grad()
    def climbed(*args: Any) -> Tensor:
        x0, sigma = cfg(*args).requires_grad_(), args[3]
        image = clip.image(painter.model.decode(x0), rounded=False)
        (slope,) = torch.autograd.grad(torch.cosine_similarity(image, text).sum(), x0)
        return (x0 + strength * sigma**2 / (1 + sigma**2) * slope).detach()

    ours = latents(tiny, clip_guidance_scale=strength)
    assert apart(ours, painter.paint(climbed)) < 1e-3
    assert apart(ours, latents(tiny)) > 1e-2


def test_gradients_are_in_the_account(tiny: TextToImage) -> None:
    shared = ASKED | {"prompt": "a star", "num_images_per_prompt": 3, "output_type": "latent"}
    asked = [Request(**shared), Request(**shared, clip_guidance_scale=40.0)]
    assert [result.account.gradients for result in tiny.paint(asked)] == [0, 15]
    assert [result.account.evaluations["decoder"] for result in tiny.paint(asked)] == [30, 30]


# --- all of them -------------------------------------------------------------------------------------------------

OF_EVERY_KIND: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"s_churn": 3.0, "num_inference_steps": 7},
    {"s_churn": 8.0, "s_tmin": 0.3, "s_tmax": 9.0, "s_noise": 1.02, "guidance_interval": (0.5, 8.0)},
    {"eta": 0.6},
    {"guidance_rule": "cfg_zero", "zero_init_steps": 1},
    {"guidance_rule": "apg", "num_inference_steps": 6},
    {"guidance_rule": "apg", "apg_eta": 0.5, "apg_norm_threshold": 3.0, "apg_momentum": 0.2, "guidance_rescale": 0.5},
    {"clip_guidance_scale": 0.5},  # the tiny CLIP, drawn large at random, turns on a pixel; a real one takes some 10
    {"clip_guidance_scale": 0.2, "guidance_rule": "apg", "guidance_interval": (0.5, 8.0)},
    {"thresholding": 1.2, "dynamic_thresholding_ratio": 0.9, "guidance_interval": (0.5, 8.0)},
]


def requests(sampler: str) -> list[Request]:
    """Rows of one lane, or of two of its kind, with settings of every kind."""
    shared = ASKED | {"prompt": "a star", "output_type": "pt", "sampler": sampler}
    asked = [Request(**(shared | each)) for each in OF_EVERY_KIND]
    return [replace(each, eta=None) if sampler == "heun" else each for each in asked]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_rows_of_every_kind_share_a_batch_and_do_not_notice(tiny: TextToImage, sampler: str) -> None:
    asked = requests(sampler)
    alone = [tiny.paint([request])[0].images for request in asked]
    for batch_size in (None, 3):
        for order in (list(range(len(asked))), [*range(len(asked))][::-1]):
            together = tiny.paint([asked[index] for index in order], batch_size=batch_size)
            for index, result in zip(order, together, strict=True):
                assert (result.images - alone[index]).abs().max() <= LEVEL


@pytest.mark.parametrize("asked", OF_EVERY_KIND, ids=str)
def test_a_record_paints_the_same_picture(tiny: TextToImage, asked: dict[str, Any]) -> None:
    result = tiny("a star", **(ASKED | {"output_type": "pt"} | asked))
    record = json.loads(json.dumps(result.records[0], allow_nan=False))
    assert (tiny.repaint(record) - result.images[0]).abs().max() <= LEVEL
    plain = {name: value for name, value in record["settings"].items() if name not in asked}
    differs = asked.keys() - {"num_inference_steps"}
    if differs:  # what was asked for is in the record, or another picture would come of it
        other = tiny.repaint(record | {"settings": plain | {"num_inference_steps": ASKED["num_inference_steps"]}})
        assert (other - result.images[0]).abs().max() > LEVEL
