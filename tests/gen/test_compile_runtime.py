"""torch.compile in a network's place: what is compiled for few fixed numbers of rows paints what torch paints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gen import Request, TextToImage, compile_runtime
from gen.attention import kernels
from gen.compile_runtime import check_compile, run_compiled
from gen.compiled import COMPILERS
from tests.pictures import LEVEL
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl
from tests.tiny_karlo import make_tiny_karlo

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
CLOSE = 1e-4  # of the largest
MIXED = [
    Request(prompt="a star", num_images_per_prompt=5, seed=0, num_inference_steps=3, output_type="latent"),
    Request(prompt="red", seed=7, num_inference_steps=2, guidance_scale=1.0, prior=False, output_type="latent"),
]
PLAIN: dict[str, Any] = {"seed": 0, "prior": False, "num_inference_steps": 3}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Stable Diffusion": make_tiny_stable_diffusion,
    "Stable Diffusion XL": make_tiny_stable_diffusion_xl,
    "Karlo": make_tiny_karlo,
}


@pytest.fixture
def by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sizes, and torch.compile without its code generator, which takes minutes for a model; the rest as it is."""
    monkeypatch.setattr(compile_runtime, "SIZES", (4, 1))
    # 2.11 lays convolutions out otherwise than it has traced them, which a group norm refuses
    backend = "eager" if torch.__version__.startswith("2.11.") else "aot_eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def latents(results: list[Any]) -> Tensor:
    return torch.cat([result.images for result in results])


def compiled_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record.getMessage() for record in caplog.records if record.name == "gen.compile_runtime"]
    return [message.split(",")[0] for message in ours]


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.usefixtures("by_pieces")
def test_rows_of_all_steps_and_texts_are_torchs(
    tiny: TextToImage, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is the dispatch mode traced by which a bucket measures."""
    compiled = TextToImage.from_pretrained(tiny_folder, "cpu", runtime="compile")
    with caplog.at_level(logging.INFO, "gen.compile_runtime"):
        wanted, found = (latents(model.paint(MIXED)) for model in (tiny, compiled))
    assert apart(found, wanted) < CLOSE
    assert {f"torch compiled UNet2DConditionModel for {size} rows" for size in (1, 4)} <= set(compiled_messages(caplog))
    alone = latents([compiled.paint([each])[0] for each in MIXED])
    assert apart(alone, found) < CLOSE


@pytest.mark.usefixtures("by_pieces")
def test_the_same_are_kept_and_guided_by_torchs_gradient(
    tiny: TextToImage, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = TextToImage.from_pretrained(tiny_folder, "cpu", runtime="compile")
    asked = PLAIN | {"num_images_per_prompt": 5, "keep": 2, "clip_guidance_scale": 0.1, "output_type": "pt"}
    with caplog.at_level(logging.INFO, "gen.compile_runtime"):
        one, other = (model("a star", **asked) for model in (tiny, compiled))
    assert one.seeds == other.seeds and one.scores == pytest.approx(other.scores, abs=1e-3)
    assert (one.images - other.images).abs().max() <= LEVEL
    assert {record["runtime"] for record in other.records} == {"compile"}
    assert {f"torch compiled {kind} for 4 rows" for kind in ("Decoder", "CLIPVisionModel")} <= set(
        compiled_messages(caplog)
    )


@pytest.mark.usefixtures("by_pieces")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_torchs(family: str, tmp_path: Path) -> None:
    """Also those whose layers see text and picture at once, so that no two rows share a text's keys and values."""
    folder = FAMILIES[family](tmp_path / "tiny")
    asked = [
        Request(prompt=prompt, num_images_per_prompt=number, seed=3, num_inference_steps=2, output_type="latent")
        for prompt, number in (("a red star", 5), ("a blue circle", 1))
    ]
    models = [TextToImage.from_pretrained(folder, "cpu", runtime=runtime) for runtime in ("torch", "compile")]
    wanted, found = (latents(model.paint(asked)) for model in models)
    assert apart(found, wanted) < CLOSE


class Twice(nn.Module):
    """What has several answers, one for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x) * factor[:, None], x


@torch.no_grad()
def test_any_number_of_rows_is_asked_in_few_sizes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, rows = Twice(), 11
    rng = torch.Generator().manual_seed(0)
    x, factor = torch.randn(rows, 3, generator=rng), torch.randn(rows, generator=rng)
    wanted = network(x, factor)
    monkeypatch.setattr(compile_runtime, "SIZES", (4, 1))
    run_compiled(network)
    with caplog.at_level(logging.INFO, "gen.compile_runtime"):
        for _ in range(2):
            for found, expected in zip(network(x, factor), wanted, strict=True):
                torch.testing.assert_close(found, expected)
    assert compiled_messages(caplog) == [f"torch compiled Twice for {size} rows" for size in (4, 1)], "each once"


@pytest.mark.usefixtures("by_pieces")
def test_merged_weights_are_compiled_anew(tiny_folder: Path, tmp_path: Path) -> None:
    layer, rng = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v", torch.Generator().manual_seed(0)
    lora = {
        f"{layer}.lora_{side}.weight": torch.randn(size, generator=rng) for side, size in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(lora, tmp_path / "lora.safetensors")
    models = [TextToImage.from_pretrained(tiny_folder, "cpu", runtime=runtime) for runtime in ("torch", "compile")]
    painted = []
    for model in models:
        before = model("a star", **PLAIN, output_type="latent").images
        model.load_lora(tmp_path / "lora.safetensors")
        painted.append(model("a star", **PLAIN, output_type="latent").images)
        assert apart(painted[-1], before) > 10 * CLOSE
    assert apart(painted[1], painted[0]) < CLOSE


def test_a_kernel_that_is_not_traced_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="attention 'math' is for runtime 'torch'; choose from: auto, sdpa, avx512"):
        TextToImage.from_pretrained(tiny_folder, "cpu", runtime="compile", attention="math")


@pytest.mark.usefixtures("by_pieces")
def test_auto_measures_attention_itself_and_not_its_trace(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16, where there may be a kernel of our own to measure."""
    timed: list[Tensor] = []
    measure = kernels.seconds
    monkeypatch.setattr(kernels, "seconds", lambda *asked: timed.append(asked[1].example(1)[0]) or measure(*asked))
    kernels.fastest.cache_clear()
    kernels.chosen.cache_clear()
    compiled = TextToImage.from_pretrained(tiny_folder, "cpu", "bfloat16", runtime="compile")
    painted = compiled("a star", **PLAIN, output_type="latent").images
    assert all(type(query) is Tensor for query in timed), "and not a tracer's"
    usual = TextToImage.from_pretrained(tiny_folder, "cpu", "bfloat16")("a star", **PLAIN, output_type="latent").images
    assert ((painted - usual).norm() / usual.norm()).item() < 0.1


def test_where_nothing_can_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is for the CPU and for CUDA, not for meta"):
        check_compile(torch.device("meta"), "auto")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"'compile' needs a C\+\+ compiler"):
        check_compile(torch.device("cpu"), "auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_answer_as_torch(tiny_folder: Path) -> None:
    models = [TextToImage.from_pretrained(tiny_folder, "cuda", runtime=runtime) for runtime in ("torch", "compile")]
    for _ in range(2):
        wanted, found = (latents(model.paint(MIXED)) for model in models)
        assert apart(found, wanted) < 10 * CLOSE
