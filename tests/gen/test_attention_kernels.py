"""Which kernel computes a shape: chosen by its name or by what is measured, and refused by what it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gen import TextToImage
from gen.attention import kernels
from gen.attention.kernels import KERNELS, Shape
from gen.attention.network import set_attention
from tests.attention import LENGTH, ROWS, apart, arguments, drawn, inputs, layer_of, painted, texts_of, unet_of


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Choices are kept for the process: forget those of other tests, and what one with kernels of its own taught."""

    def forget() -> None:
        for function in (kernels.refusal, kernels.fastest, kernels.chosen):
            function.cache_clear()

    forget()
    yield
    forget()


def test_a_kernel_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"^attention 'flsh' is unknown; choose from: auto, sdpa, flash, cudnn,"):
        TextToImage.from_pretrained("no such model", device="cpu", attention="flsh")
    with pytest.raises(ValueError, match=r"^attention 'cudnn' does not run in float32 on cpu"):
        TextToImage.from_pretrained("no such model", device="cpu", attention="cudnn")


def test_auto_measures_nothing_on_a_cpu(own: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is no cost to a command that paints one prompt."""

    def seconds(name: str, shape: Shape) -> list[float]:
        raise AssertionError(f"{name} was measured for {shape}")

    monkeypatch.setattr(kernels, "seconds", seconds)
    own("a star", seed=0, rerank=False, output_type="latent")
    assert kernels.fastest.cache_info().currsize > 0  # it was asked


def no_masks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As flash on CUDA."""
    if mask is not None:
        raise RuntimeError("masks are not\n supported")
    return KERNELS["math"](query, key, value, mask, scale)


@torch.no_grad()
def test_a_shape_that_the_kernel_does_not_take_is_left_to_torch_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(KERNELS, "flash", no_masks)
    layer, given = layer_of("cross"), arguments("cross")
    mask = 4 * drawn(ROWS, 1, LENGTH, seed=3)
    plain, masked = layer(**given), layer(**given, attention_mask=mask)
    set_attention(layer, "flash")
    with caplog.at_level(logging.INFO):
        assert apart(layer(**given), plain) < 1e-5
        assert not caplog.records
        for rows in (ROWS, 1, ROWS):
            some = {name: tensor[:rows] for name, tensor in given.items()}
            assert apart(layer(**some, attention_mask=mask[:rows]), masked[:rows]) < 1e-5
    assert [(one.levelname, one.name) for one in caplog.records] == [("WARNING", "gen.attention.kernels")]
    message = "attention 'flash' does not run for 2 heads of 16, 16 queries, 5 keys, masked, float32 on cpu, "
    assert caplog.messages == [message + "'sdpa' does it there: masks are not supported"]


CPU_SHAPE = Shape(torch.device("cpu"), torch.float32, heads=2, size=8, queries=16, keys=5)


@pytest.mark.parametrize(
    ("times", "takes"),
    [
        ({"sdpa": [1.0, 1.1, 1.2], "math": [0.5, 0.6, 0.7], "flash": [2.0, 2.0, 2.0]}, "math"),
        ({"sdpa": [1.0, 1.1, 1.2], "math": [0.5, 0.9, 0.6], "flash": [0.9, 0.9, 0.9]}, "sdpa"),  # not in every round
        ({"sdpa": [1.0, 1.0, 1.0], "math": [0.5, 0.5, 0.5], "flash": [0.45, 0.45, 0.45]}, "math"),  # hardly better
        ({"sdpa": [1.0, 1.0, 1.0], "math": [0.5, 0.5, 0.5], "flash": [0.3, 0.3, 0.3]}, "flash"),
    ],
)
def test_auto_leaves_torchs_choice_only_for_what_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, list[float]], takes: str
) -> None:
    monkeypatch.setitem(kernels.CHALLENGERS, "cpu", ("math", "flash", "cudnn"))
    monkeypatch.setattr(kernels, "seconds", lambda name, shape: times[name])  # cudnn, which cannot run, is not asked
    assert kernels.chosen("auto", CPU_SHAPE) == takes


@torch.no_grad()
def test_auto_measures_a_shape_once_however_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Shape]] = []
    real = kernels.seconds

    def seconds(name: str, shape: Shape) -> list[float]:
        asked.append((name, shape))
        return real(name, shape)

    monkeypatch.setitem(kernels.CHALLENGERS, "cpu", ("math",))
    monkeypatch.setattr(kernels, "seconds", seconds)
    unet, of = unet_of("SD 1"), [0, 0, 0, 1]
    set_attention(unet)
    for rows in (4, 3, 1):
        painted(unet, inputs("SD 1", of[:rows]), texts_of(of[:rows]))  # read in blocks of 1, 3 and 1
    shapes = {(shape.size, shape.queries, shape.keys) for _, shape in asked}
    assert shapes == {(4, 64, 64), (4, 64, LENGTH), (8, 16, 16), (8, 16, LENGTH)}
    assert len(asked) == len(set(asked)) == 2 * len(shapes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "cudnn", "efficient", "math"])
def test_every_kernel_of_a_gpu_is_close_to_float32(name: str) -> None:
    of = [0, 0, 1, 1]
    unet, given, texts = unet_of("SD 1"), inputs("SD 1", of), texts_of(of)
    exact = painted(unet, given)
    unet = unet.to("cuda", torch.float16)
    given = {k: v.to("cuda", torch.float16 if v.is_floating_point() else v.dtype) for k, v in given.items()}
    set_attention(unet, name)
    for read in (None, texts):
        assert apart(painted(unet, given, read).float().cpu(), exact) < 2e-2
