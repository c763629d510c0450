"""One model paints to `denoising_end`, another goes on from `denoising_start`: by us and by stock diffusers' XL."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor

from gen import Request, TextToImage
from gen.candidate import Candidate
from gen.picture import largest_difference
from gen.resolve import resolve
from gen.scheduler import STOCK
from tests.pictures import picture
from tests.stock import EIGHT_BIT_LEVEL, LATENTS, LONG, PROMPTS, SEED, SHORT, apart, stock_of
from tests.tiny import make_tiny_stable_diffusion_xl

SHARE = 0.6
STEPS: dict[str, Any] = {"num_inference_steps": 10}
LATENT: dict[str, Any] = {**STEPS, "output_type": "latent"}
HANDED = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Pair:
    """A base and a refiner."""

    base: Any
    refiner: Any


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("ensemble")
    refiner = make_tiny_stable_diffusion_xl(root / "refiner", seed=1, refines=True, empty_is_zeros=False)
    return Pair(make_tiny_stable_diffusion_xl(root / "base"), refiner)


@pytest.fixture(scope="module")
def ours(folders: Pair) -> Pair:
    return Pair(*(TextToImage.from_pretrained(each, device="cpu") for each in (folders.base, folders.refiner)))


@pytest.fixture(scope="module")
def stocks(folders: Pair) -> Pair:
    refiner = stock_of(StableDiffusionXLImg2ImgPipeline, folders.refiner)
    return Pair(stock_of(StableDiffusionXLPipeline, folders.base), refiner)


def theirs(pair: Pair, sampler: str | None, n: int, output_type: str = "latent", **asked: Any) -> tuple[Tensor, Any]:
    """What stock's base hands over and what its refiner makes of it, each of one generator for a picture."""
    pipelines = []
    for pipeline in (pair.base, pair.refiner):
        scheduler = pipeline.scheduler
        if sampler is not None:
            name, options = STOCK[sampler]
            scheduler = getattr(diffusers, name).from_config(scheduler.config, **options)
        pipelines.append(type(pipeline)(**pipeline.components | {"scheduler": scheduler}, **options_of(pipeline)))
    base, refiner = pipelines
    asked = {**STEPS, "num_images_per_prompt": n} | asked
    rngs = [[torch.Generator().manual_seed(SEED + k) for _ in PROMPTS for k in range(n)] for _ in range(2)]
    handed = base(PROMPTS, denoising_end=SHARE, output_type="latent", generator=rngs[0], **asked).images
    asked |= {"image": handed, "output_type": output_type}
    return handed, refiner(PROMPTS, denoising_start=SHARE, generator=rngs[1], **asked).images


def options_of(pipeline: Any) -> dict[str, Any]:
    """What a pipeline's index says beside its parts."""
    pipeline.set_progress_bar_config(disable=True)
    names = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
    return {name: pipeline.config[name] for name in names if name in pipeline.config}


def both(pair: Pair, sampler: str | None, n: int, output_type: str = "latent", **asked: Any) -> tuple[Tensor, Any]:
    """The same by us."""
    asked = {**STEPS, "num_images_per_prompt": n, "seed": SEED, "sampler": sampler} | asked
    handed = pair.base(PROMPTS, denoising_end=SHARE, output_type="latent", **asked).images
    return handed, pair.refiner(PROMPTS, denoising_start=SHARE, image=handed, output_type=output_type, **asked).images


@pytest.mark.parametrize(
    ("sampler", "n", "asked"),
    [
        (None, 1, {}),
        (None, 3, {"guidance_scale": 1.0}),
        (None, 2, {"guidance_scale": 3.0, "negative_prompt": ["blue", LONG]}),
        ("ddim", 1, {}),
        ("euler_ancestral", 2, {}),
        ("dpmpp_2m", 1, {}),
        ("dpmpp_2s", 1, {}),
        ("unipc", 1, {}),
    ],
)
def test_both_halves_equal_stock(ours: Pair, stocks: Pair, sampler: str | None, n: int, asked: dict[str, Any]) -> None:
    for mine, stock in zip(both(ours, sampler, n, **asked), theirs(stocks, sampler, n, **asked), strict=True):
        assert apart(mine, stock) <= LATENTS


def test_the_picture_equals_stock(ours: Pair, stocks: Pair) -> None:
    same = zip(both(ours, None, 2, "pil")[1], theirs(stocks, None, 2, "pil")[1], strict=True)
    assert max(largest_difference(a, b) for a, b in same) <= EIGHT_BIT_LEVEL


def test_samplers_that_ask_twice_end_between_steps(ours: Pair, stocks: Pair) -> None:
    """Stock ends within a step and makes it again: what docs/differences.md says."""
    assert apart(both(ours, "heun", 1)[1], theirs(stocks, "heun", 1)[1]) == pytest.approx(0.03, abs=0.01)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm_2"])
def test_two_halves_of_a_model_are_its_whole(ours: Pair, sampler: str) -> None:
    """For samplers that remember nothing of earlier steps, wherever it is cut."""
    asked: dict[str, Any] = {**LATENT, "sampler": sampler, "seed": SEED}
    whole = ours.base(PROMPTS, **asked)
    for share in (0.15, 0.5, 0.85):
        handed = ours.base(PROMPTS, denoising_end=share, **asked)
        rest = ours.base(PROMPTS, denoising_start=share, image=handed.images, **asked)
        assert apart(rest.images, whole.images) <= LATENTS
        spent = handed.account.evaluations["decoder"] + rest.account.evaluations["decoder"]
        assert spent == whole.account.evaluations["decoder"]


def test_a_part_in_the_middle(ours: Pair) -> None:
    asked: dict[str, Any] = {**LATENT, "seed": SEED}
    first = ours.base(SHORT, denoising_end=0.3, **asked).images
    second = ours.base(SHORT, denoising_start=0.3, denoising_end=0.7, image=first, **asked).images
    last = ours.base(SHORT, denoising_start=0.7, image=second, **asked).images
    assert apart(last, ours.base(SHORT, **asked).images) <= LATENTS


def test_pndm_goes_on_with_its_own_second_level_twice(ours: Pair) -> None:
    levels = ours.base.model.levels
    whole = levels.schedule("pndm", 10)
    assert levels.schedule("pndm", 10, start=0.15).sigmas[:4].tolist() == whole.sigmas[[2, 3, 3, 4]].tolist()
    assert levels.schedule("pndm", 10, start=0.25).sigmas[:4].tolist() == whole.sigmas[[3, 4, 4, 5]].tolist()
    assert levels.schedule("pndm", 10, end=0.25).num_steps == 3


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_latents_may_be_the_picture_to_begin_with(ours: Pair, stocks: Pair, strength: float) -> None:
    asked: dict[str, Any] = {**LATENT, "strength": strength}
    painted = ours.refiner(SHORT, image=HANDED, seed=SEED, **asked).images
    rng = torch.Generator().manual_seed(SEED)
    assert apart(painted, stocks.refiner(SHORT, image=HANDED, generator=rng, **asked).images) <= LATENTS
    with pytest.raises(ValueError, match="a picture has"):  # four channels without a batch are no latents, as in stock
        ours.refiner(SHORT, image=HANDED[0], **asked)


def test_parts_of_runs_share_a_batch_with_whole_ones(ours: Pair) -> None:
    asked: dict[str, Any] = {**LATENT, "sampler": "dpmpp_2m", "seed": SEED, "height": 48, "width": 80}
    requests = [
        Request(prompt=SHORT, **asked),
        Request(prompt=LONG, denoising_end=SHARE, **asked),
        Request(prompt=SHORT, denoising_start=SHARE, image=HANDED, **asked),
        Request(prompt=SHORT, image=picture(), strength=0.5, denoising_end=0.8, **asked),
    ]
    together = ours.base.paint(requests)
    for request, result in zip(requests, together, strict=True):
        assert apart(ours.base.paint([request])[0].images, result.images) <= LATENTS


def test_latents_are_for_all_for_prompts_or_for_pictures(ours: Pair) -> None:
    handed = torch.cat([HANDED + k for k in range(4)])
    abilities = ours.refiner.model.abilities

    def begun(number: int) -> list[float]:
        request = Request(prompt=PROMPTS, num_images_per_prompt=2, image=handed[:number], denoising_start=SHARE)
        each = [one.image_latents for one in resolve(request, abilities).candidates]
        return [round(float((one - HANDED[0]).mean())) for one in each if one is not None]

    assert begun(1) == [0, 0, 0, 0] and begun(2) == [0, 0, 1, 1] and begun(4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="image has 3 latents for 2 prompts of 2 pictures; give one, one for each"):
        begun(3)


def test_records_say_where_a_run_ended_and_what_they_lack(ours: Pair) -> None:
    result = ours.base(SHORT, denoising_end=SHARE, seed=SEED, output_type="pt", **STEPS)
    record = json.loads(json.dumps(result.records[0]))
    assert record["settings"]["denoising_end"] == SHARE
    assert torch.equal(ours.base.repaint(record), result.images[0])
    record = ours.refiner(SHORT, denoising_start=SHARE, image=HANDED, seed=SEED, **LATENT).records[0]
    with pytest.raises(ValueError, match=r"painted from tensors \(image\) that its record lacks"):
        ours.refiner.repaint(record)
    damaged = {name: value for name, value in record.items() if name != "given"}
    with pytest.raises(ValueError, match="the record is damaged: it goes on from latents"):
        Candidate.from_json(damaged, ours.refiner.model.abilities)


def test_what_is_not_whole_is_not_ranked(ours: Pair) -> None:
    abilities = replace(ours.base.model.abilities, can_rank=True)
    assert resolve(Request(prompt=SHORT), abilities).rank
    assert not resolve(Request(prompt=SHORT, denoising_end=0.5), abilities).rank
    with pytest.warns(UserWarning, match="strength is ignored: denoising_start says where it begins"):
        job = resolve(Request(prompt=SHORT, image=HANDED, denoising_start=SHARE, strength=0.5), abilities)
    assert job.rank and job.candidates[0].settings.strength == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"denoising_end": 1.5}, "denoising_end=1.5 is out of range; give a number from 0 to 1"),
        ({"denoising_end": 0.0}, r"denoising_start=0.0 is not below denoising_end=0.0; give shares"),
        ({"denoising_end": 0.01}, "denoising_start=0.0 and denoising_end=0.01 leave none of 10 steps"),
        ({"denoising_end": 0.5, "rerank": True}, "rerank=True needs whole pictures, and denoising_end=0.5 leaves none"),
        ({"denoising_end": 0.5, "keep": 1, "num_images_per_prompt": 2}, "denoising_end=0.5 leaves no whole picture"),
        ({"denoising_end": 0.5, "search": "halving"}, "search 'halving' goes by CLIP's scores, but nothing is ranked"),
        ({"denoising_start": 0.5}, "denoising_start goes on from latents; give image=latents"),
        ({"denoising_start": 0.5, "image": picture()}, "denoising_start goes on from latents"),
        ({"denoising_start": 0.5, "image": HANDED, "search": "draft"}, "search 'draft' begins with noise"),
        ({"denoising_start": 0.5, "image": HANDED, "denoising_end": 0.4}, "is not below denoising_end=0.4"),
        ({"denoising_start": 0.999, "image": HANDED}, "leave none of 10 steps; let them be further apart"),
        ({"image": HANDED, "height": 64}, "height=64, and image's latents are of 48; leave it out"),
        ({"image": HANDED, "mask_image": picture()}, "mask_image and image as latents were both given"),
        ({"image": HANDED, "latents": HANDED}, "latents and image as latents were both given"),
        ({"image": HANDED, "strength": 0.5, "denoising_end": 0.4}, "strength=0.5, .* leave none of 10 steps"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(ours: Pair, asked: dict[str, Any], message: str) -> None:
    model = ours.base
    with pytest.raises(ValueError, match=message) as caught, model.engine() as engine:
        job = resolve(Request(**{"prompt": SHORT, **STEPS} | asked), replace(model.model.abilities, can_rank=True))
        engine.submit(job)
    assert "\n" not in str(caught.value)
