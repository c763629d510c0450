"""The whole way of a request on a GPU that is pretended: the CPU's picture, no devices mixed, and who waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_core.device import to_device
from gen import TextToImage
from gen.picture import largest_difference
from samplers.sample import SAMPLERS
from tests.cuda import pretended
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl
from tests.tiny_karlo import make_tiny_karlo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and there is one")

PROMPT = "a small red circle"
PICTURE, MASK = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64))
MASK.paste(255, (0, 0, 32, 32))
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "stable diffusion": make_tiny_stable_diffusion,
    "stable diffusion xl": make_tiny_stable_diffusion_xl,
    "karlo": make_tiny_karlo,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "guidance rescaled": {"guidance_rescale": 0.5},
    "guidance in an interval": {"guidance_interval": (0.5, 5.0)},
    "cfg_zero": {"guidance_rule": "cfg_zero", "zero_init_steps": 1},
    "apg": {"guidance_rule": "apg", "apg_momentum": -0.5},
    "thresholding": {"thresholding": 1.0, "dynamic_thresholding_ratio": 0.9},
    "negative prompt": {"negative_prompt": "a blue square"},
    "another size": {"height": 32, "width": 96},
    "a picture": {"image": PICTURE, "strength": 0.6},
    "a mask": {"image": PICTURE, "mask_image": MASK, "strength": 0.8},
    "churn": {"sampler": "euler", "s_churn": 2.0},
    "diverse": {"num_images_per_prompt": 4, "keep": 2, "diverse": True},
    "best of the prior": {"prior": True, "prior_best_of": 2},
    **{f"sampler {name}": {"sampler": name} for name in sorted(SAMPLERS)},
}
SEARCHES = ("best_of", "draft", "feynman_kac", "halving", "racing", "zero_order")


@pytest.fixture(scope="module")
def gpu(tiny_folder: Path) -> TextToImage:
    with pretended():
        return TextToImage.from_pretrained(tiny_folder, "cuda", attention="sdpa")


def painted(model: TextToImage, steps: int = 6, **settings: Any) -> Any:
    words: dict[str, Any] = {"num_images_per_prompt": 2, "seed": 3, "output_type": "pt", **settings}
    return model(PROMPT, num_inference_steps=steps, **words)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_step_waits_for_the_gpu(gpu: TextToImage, tiny: TextToImage, settings: dict[str, Any]) -> None:
    """Twice the steps wait as often; and the picture is the CPU's."""
    waits = []
    with pretended() as watch:
        painted(gpu, **settings)  # what is made once is made
        for steps in (6, 12):
            watch.waits.clear()
            images = painted(gpu, steps, **settings).images
            waits.append(Counter(watch.waits))
    assert waits[0] == waits[1]
    expected = painted(tiny, 12, **settings)
    assert (images - expected.images).abs().max() < 1e-4


def test_convolutions_have_channels_last_there(gpu: TextToImage, tiny: TextToImage) -> None:
    def layouts(model: TextToImage) -> set[bool]:
        weights = [each for network in model.model.networks() for each in network.parameters() if each.ndim == 4]
        large = [each for each in weights if each.shape[1] > 1 and each.shape[2] > 1]
        assert len(large) > 10
        return {each.is_contiguous(memory_format=torch.channels_last) for each in large}

    assert layouts(gpu) == {True} and layouts(tiny) == {False}


def test_float32_is_not_tf32_there(gpu: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch rounds what convolutions multiply unless it is told not to; whoever else computes is left alone."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as torch has it by default
    seen = []
    watches = [
        network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
        for network in (gpu.model.unet, gpu.model.vae.decoder, gpu.model.clip.towers.image_network)
    ]
    with pretended():
        painted(gpu)
    for watch in watches:
        watch.remove()
    assert len(seen) >= 6 + 2 and not any(seen)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_keep_the_same_there(gpu: TextToImage, tiny: TextToImage, search: str) -> None:
    asked: dict[str, Any] = {"num_images_per_prompt": 4, "keep": 2, "search": search, "output_type": "pil", "eta": 1.0}
    expected = painted(tiny, **asked)
    with pretended():
        result = painted(gpu, **asked)
    assert result.seeds == expected.seeds
    assert result.scores == pytest.approx(expected.scores, abs=2e-3)
    assert all(map(lambda one, other: largest_difference(one, other) <= 1, result.images, expected.images))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_paint_the_same_there(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    expected = painted(TextToImage.from_pretrained(folder, "cpu"), rerank=False).images
    waits = []
    with pretended() as watch:
        model = TextToImage.from_pretrained(folder, "cuda", attention="sdpa")
        painted(model, rerank=False)
        for steps in (3, 6):
            watch.waits.clear()
            images = painted(model, steps, rerank=False).images
            waits.append(Counter(watch.waits))
    assert waits[0] == waits[1]
    assert (images - expected).abs().max() < (1e-2 if family == "karlo" else 1e-3)  # it starts at a level of 20,291


@pytest.mark.parametrize("version", ["2.2", "2.1"])
def test_kandinsky_paints_the_same_there(kandinsky_folders: Any, kandinskys: Any, version: str) -> None:
    expected = painted(kandinskys[version], rerank=False).images
    with pretended():
        model = TextToImage.from_pretrained(kandinsky_folders[version]["combined"], "cuda", attention="sdpa")
        images = painted(model, rerank=False).images
    assert (images - expected).abs().max() < 1e-2


def test_what_a_request_waits_for(gpu: TextToImage) -> None:
    """For its text's first token, which says how the prior runs, scores, pictures, and an engine's tables; no step."""
    with pretended() as watch:
        painted(gpu)
        watch.waits.clear()
        painted(gpu, num_images_per_prompt=4, keep=2)
    places = {wait.partition(":")[0] for wait in watch.waits}
    assert places == {"gen/prior_prefix.py", "gen/flight.py", "gen/answer.py", "samplers/scaling.py"}


def test_waits_and_mixed_devices_are_seen() -> None:
    with pretended() as watch:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="of tensors on cuda:0 and on cpu"):
            there + here
        assert (there + 1).device.type == "cuda" and not watch.waits
        for wait in (
            lambda: there.sum().item(),
            lambda: bool((there > 0).all()),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: here.to("cuda"),
            lambda: here.to("cuda", non_blocking=True),  # from memory that is not pinned
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: there.new_tensor([1.0]),
            lambda: there[torch.tensor([0, 1])],
            lambda: there[there > 0],
            lambda: there.nonzero(),
        ):
            watch.waits.clear()
            wait()
            assert len(watch.waits) >= 1
        watch.waits.clear()
        to_device(here, there.device)
        there[1:].mul_(2)
        there.index_select(0, there.argmax()[None])
        assert not watch.waits and there.tolist() == [1, 2, 2]
