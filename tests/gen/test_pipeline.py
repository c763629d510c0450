"""The Python face: calls, callbacks, and how a picture is painted again."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gen import Cancelled, Step, TextToImage
from gen.card import Card
from gen.search import best_first, drawing_order
from tests.pictures import LEVEL
from tests.tiny import make_tiny_clip

PROMPTS = ["a small red circle", "a large blue square"]


def test_sizes_the_unet_halves_unevenly(tiny: TextToImage) -> None:
    assert tiny("a star", seed=1, height=72, width=40, output_type="pt").images.shape == (1, 3, 72, 40)


def test_no_seed_draws_one_and_reports_it(tiny: TextToImage) -> None:
    drawn = tiny("a star", num_images_per_prompt=2, rerank=False, output_type="pt")
    again = tiny("a star", num_images_per_prompt=2, rerank=False, output_type="pt", seed=drawn.seeds[0])
    assert torch.equal(drawn.images, again.images)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"prior": False, "negative_prompt": "a star", "guidance_interval": (0.2, 9.0)},
        {"sampler": "dpmpp_2m_sde", "num_inference_steps": 6, "guidance_rescale": 0.5, "height": 32},
        {"eta": 1.0, "noise_level": 100, "clip_skip": 1, "prior_guidance_scale": 2.0},
    ],
)
def test_a_record_paints_its_picture_again(tiny: TextToImage, words: dict[str, Any]) -> None:
    result = tiny(PROMPTS, num_images_per_prompt=3, keep=2, seed=30, output_type="pt", **words)
    records = json.loads(json.dumps(result.records))  # as it comes back from a file
    for image, record, seed, prompt in zip(result.images, records, result.seeds, result.prompts, strict=True):
        assert (record["seed"], record["prompt"]) == (seed, prompt)
        assert record["model_hash"] == tiny.hash and len(tiny.hash) == 64
        again = tiny.repaint(record)
        assert again.shape == image.shape and (again - image).abs().max() <= LEVEL
        other = tiny.repaint(record | {"seed": seed + 100})
        assert (other - image).abs().max() > LEVEL


def test_repaint_refuses_what_it_cannot_repeat(tiny: TextToImage) -> None:
    (record,) = tiny("a star", seed=1).records
    with pytest.raises(ValueError, match="and this is"):
        tiny.repaint(record | {"model_hash": "0" * 64})
    given = tiny("a star", seed=1, latents=torch.zeros(1, 4, 8, 8)).records[0]
    with pytest.raises(ValueError, match=r"painted from tensors \(latents\)"):
        tiny.repaint(given)


def test_what_was_ignored_is_not_in_the_record(tiny: TextToImage) -> None:
    """So it keeps nobody from painting the picture again."""
    unread = {"super_res_latents": torch.zeros(1, 3, 8, 8)}
    abilities = tiny.model.abilities
    assert abilities.text_shape is not None and abilities.embedding_width is not None
    unread["negative_prompt_embeds"] = torch.zeros(1, *abilities.text_shape)
    unread["prior_latents"] = torch.zeros(1, abilities.embedding_width)
    with pytest.warns(
        UserWarning, match=r"^(super_res|prior)_latents is ignored|^negative_prompt_embeds is ignored"
    ) as warned:
        result = tiny("a star", seed=1, prior=False, guidance_scale=1.0, output_type="pt", **unread)
    assert len(warned) == 3 and "given" not in result.records[0]
    assert (tiny.repaint(result.records[0]) - result.images[0]).abs().max() <= LEVEL


def test_a_record_says_how_it_was_computed(tiny: TextToImage) -> None:
    (record,) = tiny("a star", seed=1).records
    assert (record["dtype"], record["attention"]) == ("float32", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.repaint(record)
    for computed in ({"dtype": "bfloat16"}, {"attention": "math"}):
        with pytest.warns(UserWarning, match=f"with {' '.join(*computed.items())}, and this is"):
            tiny.repaint(record | computed)


def test_a_callback_looks(tiny: TextToImage) -> None:
    steps: list[Step] = []
    result = tiny(PROMPTS, seed=1, rerank=False, output_type="latent", callback=steps.append)
    assert [(step.stage, step.steps_left) for step in steps] == [
        *[("prior", [left] * 2) for left in (2, 1, 0)],
        *[("decoder", [left] * 2) for left in (3, 2, 1, 0)],
    ]
    assert steps[0].x0.shape == (2, 16) and steps[-1].seeds == [1, 1]
    assert torch.allclose(steps[-1].x0, result.images, atol=1e-5)  # a step to level 0 ends at its estimate


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_callback_cancels(tiny: TextToImage, stage: str) -> None:
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if step.stage == stage and step.steps_left[0] == 1:
            step.cancel()

    with pytest.raises(Cancelled, match=f"cancelled in the {stage} with 1 steps left"):
        tiny("a star", seed=1, callback=stop)
    assert (seen[-1].stage, seen[-1].steps_left) == (stage, [1])
    assert tiny("a star", seed=1).seeds == [1]  # and the model paints on


def test_one_text_is_encoded_once(tiny: TextToImage) -> None:
    """Sixteen candidates ask the text tower for two texts: the prompt and what they are guided away from."""
    count = 0

    def counted(_: Any, words: Any, kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += len(kwargs["input_ids"])

    hook = tiny.model.text.encoder.register_forward_pre_hook(counted, with_kwargs=True)
    tiny("a star", negative_prompt="red", num_images_per_prompt=16, seed=1, prior=False, rerank=False)
    hook.remove()
    assert count == 2


def test_too_long_a_prompt_is_cut_and_said(tiny: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    tiny("a red circle " * 20 + "zebra", seed=1, prior=False, rerank=False)
    assert any("zebra" in record.getMessage() for record in caplog.records)


def test_bfloat16_paints_nearly_the_same(tiny_folder: Any, tiny: TextToImage) -> None:
    half = TextToImage.from_pretrained(tiny_folder, device="cpu", dtype=torch.bfloat16)
    one, other = (model("a star", seed=3, output_type="pt", prior=False) for model in (tiny, half))
    assert one.images.dtype == other.images.dtype == torch.float32
    assert 0 < (one.images - other.images).abs().mean() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_paints_the_cpus_picture(tiny_folder: Any, tiny: TextToImage) -> None:
    gpu = TextToImage.from_pretrained(tiny_folder, device="cuda")
    for words in ({}, {"sampler": "dpmpp_2m_sde"}, {"sampler": "heun", "guidance_rescale": 0.5}):
        one, other = (model(PROMPTS, seed=3, output_type="pt", **words) for model in (tiny, gpu))
        assert (one.images - other.images).abs().max() < 0.02


def test_search_orders() -> None:
    assert best_first([0.1, 0.3, 0.3, 0.9, float("nan"), 0.2], 3, 2) == [[1, 2], [3, 5]]
    assert drawing_order(4, 2) == [[0, 1], [2, 3]]


def test_importing_gen_loads_nothing_heavy() -> None:
    code = "import sys, gen; dir(gen); print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    code = "from gen import TextToImage, Request, Card"
    assert (
        "cannot import name 'Card'"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    )


def test_a_model_in_memory_has_no_hash(tiny: TextToImage) -> None:
    bare = TextToImage(tiny.model)
    assert bare.hash == "" and bare.card == tiny.card and isinstance(bare.card, Card)
    record = bare("a star", seed=1, output_type="pt").records[0]
    assert record["model_hash"] == "" and bare.repaint(record).shape == (3, 64, 64)


def test_a_model_is_loaded_from_a_record(tiny_folder: Path, tmp_path: Path) -> None:
    """As it was computed, with its adapters; what lies elsewhere is said."""
    make_tiny_clip(tmp_path / "clip", seed=3)
    model = TextToImage.from_pretrained(tiny_folder, "cpu", attention="math", clip=tmp_path / "clip")
    words: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "pt"}
    ranked = model("a star", **words)
    guided = model("a star", clip_guidance_scale=1.0, **words)
    for result in (ranked, guided):
        record = json.loads(json.dumps(result.records[0]))
        again = TextToImage.of_record(record, "cpu")
        assert again.compute == model.compute and again.clip_hash == (model.clip_hash if result is guided else "")
        assert torch.equal(again.repaint(record), result.images[0])
    (tmp_path / "clip").rename(tmp_path / "moved")
    again = TextToImage.of_record(record | {"model": "nowhere"}, "cpu", model=tiny_folder, clip=tmp_path / "moved")
    assert torch.equal(again.repaint(record), guided.images[0])
    elsewhere = TextToImage.of_record(ranked.records[0] | {"attention": "cudnn"}, "cpu")
    assert elsewhere.compute.attention == "auto"
    for lacking, message in (("model", "names no model; give it with model="), ("model_hash", "has no model_hash")):
        with pytest.raises(ValueError, match=f"the record {message}"):
            TextToImage.of_record({name: value for name, value in record.items() if name != lacking})
    with pytest.raises(ValueError, match="clip was given, but CLIP ranked the picture"):
        TextToImage.of_record(ranked.records[0], clip=tmp_path / "moved")
