"""Who computes the networks: OpenVINO paints what torch paints, and a lower precision stands in the record."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gen import Request, TextToImage, openvino_runtime, runtime
from gen.openvino_model import cut_levels, read
from gen.openvino_runtime import core, streams_of
from gen.pieces import SIZES, pieces_of
from tests.cuda import pretended
from tests.pictures import LEVEL
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl
from tests.tiny_kandinsky import make_tiny_kandinsky
from tests.tiny_karlo import make_tiny_karlo

NEEDS_OPENVINO = pytest.mark.usefixtures("installed")
CLOSE = 1e-4  # of the largest
ROOT = Path(__file__).parents[2]
MIXED = [
    Request(prompt="a star", num_images_per_prompt=3, seed=0, num_inference_steps=3, output_type="latent"),
    Request(prompt="red", seed=7, num_inference_steps=2, guidance_scale=1.0, prior=False, output_type="latent"),
]
PLAIN: dict[str, Any] = {"seed": 0, "prior": False, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def installed() -> None:
    pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def fast(tiny_folder: Path, installed: None) -> TextToImage:
    return TextToImage.from_pretrained(tiny_folder, runtime="openvino")


def latents(results: list[Any]) -> Tensor:
    return torch.cat([result.images for result in results])


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# --- what is refused ---------------------------------------------------------------------------------------------


def test_what_cannot_run_is_refused_in_one_line(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "core", core.__wrapped__)  # the one that is kept is the one that others hold
    monkeypatch.setitem(sys.modules, "openvino", None)  # as where it is not installed
    for asked, message in (
        ({"runtime": "onnx"}, r"runtime 'onnx' is unknown; choose from: torch, compile, openvino"),
        ({"runtime": "openvino"}, r"not installed .*; pip install 'unclip\[openvino\]'"),
        ({"runtime": "openvino", "dtype": "float16"}, r"computes in float32 or bfloat16, not in float16"),
        ({"dtype": torch.int8}, r"dtype 'int8' is unknown; choose from: float32, bfloat16, float16"),
        ({"dtype": 3}, r"dtype '3' is unknown"),
        ({"dtype": "float8"}, r"dtype 'float8' is unknown; choose from: float32, bfloat16, float16"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            TextToImage.from_pretrained(tiny_folder, **asked)
        assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and there is one")
def test_openvino_is_for_the_cpu(tiny_folder: Path, installed: None) -> None:
    with pretended(), pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
        TextToImage.from_pretrained(tiny_folder, "cuda", runtime="openvino")


@NEEDS_OPENVINO
def test_attention_is_torchs(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="attention 'math' is torch's, and runtime 'openvino' has its own"):
        TextToImage.from_pretrained(tiny_folder, runtime="openvino", attention="math")


# --- OpenVINO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 75])
@pytest.mark.parametrize("streams", [1, 2, 16])
@pytest.mark.parametrize("of", [None, [0] * 75, [0] * 5 + [1] * 70, [0, 1, 2] * 25])
def test_pieces_are_every_row_once(rows: int, streams: int, of: list[int] | None) -> None:
    texts = of and of[:rows]
    pieces = pieces_of(rows, texts, SIZES, streams)
    assert [row for piece in pieces for row in range(rows)[piece.at]] == list(range(rows))
    assert all(piece.size in SIZES and piece.at.stop - piece.at.start == piece.size for piece in pieces)
    assert len(pieces) >= min(rows, streams)  # a share for each
    assert all(texts and len(set(texts[piece.at])) == 1 for piece in pieces if piece.is_shared)


def test_streams_are_few_kinds() -> None:
    assert [streams_of(pieces, threads) for pieces, threads in ((1, 2), (2, 2), (9, 2), (3, 16), (40, 6))] == [
        1,
        2,
        2,
        2,
        4,
    ]


def kinds(of: list[int]) -> list[tuple[int, bool]]:
    """Of the pieces for two streams."""
    return [(piece.size, piece.is_shared) for piece in pieces_of(len(of), of, SIZES, 2)]


def test_rows_that_read_one_text_share_its_keys_and_values() -> None:
    assert kinds([0] * 16 + [1] * 16) == [(16, True), (16, True)]
    assert kinds([0, 1]) == [(1, True), (1, True)]
    assert kinds([*range(32)]) == [(16, False), (16, False)], "single rows would each be a call"
    assert kinds([row // 24 for row in range(96)]) == [(16, True), (8, True)] * 4
    assert set(kinds([row // 5 for row in range(100)])) == {(16, False), (2, False)}


def test_each_stream_has_as_much_to_do() -> None:
    for rows, sizes in ((100, [16] * 6 + [2] * 2), (80, [16] * 4 + [8] * 2), (24, [8] * 2 + [4] * 2), (3, [1] * 3)):
        assert [piece.size for piece in pieces_of(rows, None, SIZES, 2)] == sizes


@torch.no_grad()
def test_a_piece_that_fails_ends_the_call_and_the_next_one_is_right(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = nn.Linear(3, 5), torch.randn(160, 3, generator=torch.Generator().manual_seed(0))
    wanted, taken = network(x), []
    openvino_runtime.run_by_openvino(network, torch.float32)

    def failing(stream: object, answers: object, inputs: object, left: Iterator[object]) -> None:
        taken.append(next(left))
        raise ValueError("of one piece")

    with monkeypatch.context() as patched:
        patched.setattr(openvino_runtime.Stream, "fill", failing)
        with pytest.raises(ValueError, match="of one piece"):
            network(x)
    assert 1 <= len(taken) <= torch.get_num_threads(), "no other piece begins"
    torch.testing.assert_close(network(x), wanted)


@torch.no_grad()
def test_rows_of_all_steps_and_texts_are_torchs(tiny: TextToImage, fast: TextToImage) -> None:
    wanted, found = latents(tiny.paint(MIXED)), latents(fast.paint(MIXED))
    assert (found - wanted).abs().max() < CLOSE * wanted.abs().max()
    assert not torch.equal(found, wanted)  # or torch itself has answered
    alone = latents([fast.paint([each])[0] for each in MIXED])
    assert (found - alone).abs().max() < CLOSE * wanted.abs().max()


@torch.no_grad()
def test_rows_whose_texts_are_their_own_read_them_and_not_those_of_the_call_before(
    tiny: TextToImage, fast: TextToImage
) -> None:
    plain: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 2, "prior": False, "output_type": "latent"}
    for words in (("red", "blue", "star", "moon"), ("green", "old", "cat", "sea")):
        asked = [Request(prompt=f"a {word}", seed=seed, **plain) for seed in (1, 2) for word in words]
        wanted, found = latents(tiny.paint(asked)), latents(fast.paint(asked))
        assert (found - wanted).abs().max() < CLOSE * wanted.abs().max()


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Stable Diffusion": make_tiny_stable_diffusion,
    "Stable Diffusion XL": make_tiny_stable_diffusion_xl,
}
REFUSED: dict[str, Callable[[Path], Path]] = {
    "UnCLIPPipeline": make_tiny_karlo,
    "KandinskyCombinedPipeline": lambda folder: make_tiny_kandinsky(folder, "2.1")["combined"],
    "KandinskyV22CombinedPipeline": lambda folder: make_tiny_kandinsky(folder, "2.2")["combined"],
}


class Waves(nn.Module):
    """A picture times what its level says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(x.shape[0])
        return x * self.layer(torch.stack([t.sin(), t.cos()], dim=1))[:, :, None]


@torch.no_grad()
def test_a_level_is_computed_once_whoever_is_beside_it(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_runtime, "KNOWN", 20)
    network, x = Waves(), torch.ones(40, 3, 5)
    part, _ = cut_levels(read(network, (x[:2], torch.zeros(2))), [1])
    assert part is not None
    levels = openvino_runtime.Levels.of(part, [1])
    asked: list[int] = []
    compute = levels.compiled
    levels.compiled = lambda arrays: asked.append(len(arrays[-1])) or compute(arrays)

    def embedded(*t: float) -> Tensor:
        found = levels([x[: len(t)].numpy(), np.array(t, np.float32)])
        return torch.from_numpy(found).reshape(len(t), 3)

    first = embedded(3, 1, 3)
    assert torch.equal(first[0], first[2]) and asked == [16], "computed so many at a time, always"
    torch.testing.assert_close(first[:, :, None].expand(-1, -1, 5), network(x[:3], torch.tensor([3.0, 1, 3])))
    assert torch.equal(embedded(1, 3), first[[1, 0]]) and asked == [16], "known"
    many = embedded(*range(40))
    assert len(asked) == 1 + 3 and len(levels.known) == 20, "two were known, and of all the last are kept"
    assert torch.equal(many[[3, 1]], first[:2])
    assert torch.equal(embedded(3, 39), many[[3, 39]]) and len(asked) == 5, "the same when it was forgotten"


@pytest.mark.parametrize("family", REFUSED)
def test_what_openvino_crashes_on_is_refused(family: str, installed: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'openvino' cannot compute the UNet of a {family}, .*; give runtime 'torch'"):
        TextToImage.from_pretrained(REFUSED[family](tmp_path / "tiny"), runtime="openvino", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_torchs(family: str, installed: None, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "tiny")
    asked = [
        Request(prompt=prompt, num_images_per_prompt=number, seed=3, num_inference_steps=2, output_type="latent")
        for prompt, number in (("a red star", 3), ("a blue circle", 1))
    ]
    models = [TextToImage.from_pretrained(folder, runtime=runtime, device="cpu") for runtime in ("torch", "openvino")]
    wanted, found = (latents(model.paint(asked)) for model in models)
    assert (found - wanted).abs().max() < CLOSE * wanted.abs().max()
    assert not torch.equal(found, wanted)
    with torch.inference_mode():  # as servers do
        again = latents(models[1].paint(asked))
    assert torch.equal(again, found)


def test_the_same_are_kept(tiny: TextToImage, fast: TextToImage) -> None:
    one, other = (model("a star", num_images_per_prompt=5, keep=2, **PLAIN) for model in (tiny, fast))
    assert one.seeds == other.seeds and one.scores == pytest.approx(other.scores, abs=1e-3)  # of pixels a level apart
    for painted, wanted in zip(other.images, one.images, strict=True):
        assert np.abs(np.asarray(painted, int) - np.asarray(wanted, int)).max() <= 1


def test_nobody_is_told_of_it(tiny_folder: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = pytest.importorskip("openvino_telemetry")
    sent: list[Any] = []
    monkeypatch.setattr(telemetry.Telemetry, "init", lambda *args, **_: sent.append(args))
    model = TextToImage.from_pretrained(tiny_folder, runtime="openvino")
    model("a star", num_inference_steps=1, seed=0)
    assert not sent


def test_a_gradient_is_torchs(tiny: TextToImage, fast: TextToImage) -> None:
    asked = PLAIN | {"clip_guidance_scale": 5.0, "output_type": "latent"}
    one, other = (model("a star", **asked).images for model in (tiny, fast))
    assert (one - other).abs().max() < 10 * CLOSE * one.abs().max()  # a random CLIP's slope is steep


def test_merged_weights_are_read_anew(tiny_folder: Path, installed: None, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(tiny_folder, runtime="openvino")
    layer, before = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", model.model.unet.forward
    lora = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    model.load_lora(tmp_path / "lora.safetensors")
    assert model.model.unet.forward is not before


def test_what_is_saved_is_the_models_own(fast: TextToImage, tmp_path: Path) -> None:
    saved = TextToImage.from_pretrained(fast.save(tmp_path / "saved", dtype=torch.bfloat16)).model.unet.state_dict()
    own = fast.model.unet.state_dict()
    assert all(torch.equal(weight, own[name].bfloat16().float()) for name, weight in saved.items())


# --- a lower precision -------------------------------------------------------------------------------------------


@NEEDS_OPENVINO
def test_bfloat16_is_as_near_as_torchs_and_in_the_record(tiny_folder: Path, tiny: TextToImage) -> None:
    try:
        fast = TextToImage.from_pretrained(tiny_folder, dtype="bfloat16", runtime="openvino")
    except ValueError as error:
        pytest.skip(str(error))  # a processor without it
    half = TextToImage.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    wanted, usual, found = (latents(model.paint(MIXED)) for model in (tiny, half, fast))
    assert 1e-4 < apart(found, wanted) < 1.5 * apart(usual, wanted)
    painted = fast("a star", **PLAIN, output_type="pt")
    (record,) = painted.records
    assert (record["dtype"], record["runtime"]) == ("bfloat16", "openvino")
    assert (fast.repaint(record) - painted.images[0]).abs().max() <= LEVEL
    for model in (tiny, half):
        with pytest.warns(UserWarning, match="was painted with runtime openvino, and this is torch"):
            model.repaint(record)


PAINTED = "model('a red circle', num_images_per_prompt=2, num_inference_steps=1)"
PAINTING = """
import threading
begun, engine = threading.Event(), model.engine()
engine.start()
request = gen.Request(prompt='a red circle', num_images_per_prompt=4, num_inference_steps=900)
engine.submit(request, callback=lambda step: begun.set())
begun.wait()"""


PAINTS_ON = f"""
import threading, time
{PAINTED}
threading.Thread(target=lambda: (time.sleep(1), {PAINTED})).start()"""


@pytest.mark.parametrize("code", [PAINTED, PAINTING, PAINTS_ON], ids=["has painted", "paints", "paints on"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_ends_in_order(dtype: str, code: str, installed: None) -> None:
    """Also while threads compute, and whatever the order in which our kernels and what reads them are let go of."""
    if dtype == "bfloat16" and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    load = f"import gen\nmodel = gen.TextToImage.from_pretrained('shapes64', dtype={dtype!r}, runtime='openvino')\n"
    done = subprocess.run([sys.executable, "-c", load + code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr


def test_float32_is_alike_by_any_runtime(tiny: TextToImage, fast: TextToImage) -> None:
    painted = fast("a star", **PLAIN, output_type="pt")
    (record,) = painted.records
    assert (record["dtype"], record["runtime"]) == ("float32", "openvino")
    with pytest.warns(UserWarning, match="was painted with runtime openvino, and this is torch"):
        again = tiny.repaint(record)
    assert (again - painted.images[0]).abs().max() <= LEVEL


# --- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used(tiny_folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used") as caught:
        TextToImage.from_pretrained(tiny_folder, device=device)
    assert "\n" not in str(caught.value)


def test_a_device_without_float64_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS is; noise levels are float64."""

    def zeros(*shape: object, dtype: torch.dtype | None = None, **options: object) -> torch.Tensor:
        assert dtype == torch.float64
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"device 'mps' cannot be used .*float64"):
        TextToImage.from_pretrained(tiny_folder, device="mps")


def test_device_0_is_a_gpu_and_not_the_default(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usable(device: object) -> torch.device:
        asked.append(device)
        return torch.device("cpu")

    monkeypatch.setattr("gen.runtime.usable", usable)
    TextToImage.from_pretrained(tiny_folder, 0)
    assert asked == [0]
