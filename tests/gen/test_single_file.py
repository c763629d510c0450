"""Single files in their authors' layout: the pictures of the folder they were written from, and no network."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen import TextToImage, single_file
from gen.cli import reproduce
from gen.facts import facts_of
from gen.picture import write_png
from gen.single_file import CONFIGS, LAYOUTS, layout_of, tokenizer_of
from tests.ldm import write_single_file
from tests.stock import PROMPTS, SEED, SHORT, edited
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl

KINDS = ("1", "2", "xl", "refiner")


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("single")
    return {
        "1": make_tiny_stable_diffusion(root / "1", version=1),
        "2": make_tiny_stable_diffusion(root / "2", version=2),
        "xl": make_tiny_stable_diffusion_xl(root / "xl"),
        "refiner": make_tiny_stable_diffusion_xl(root / "refiner", refines=True),
    }


@pytest.fixture(scope="session")
def files(folders: dict[str, Path]) -> dict[str, Path]:
    return {
        kind: write_single_file(folder, folder.with_suffix(".safetensors"), open_clip=kind == "2")
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_of_the_folder(files: dict[str, Path], folders: dict[str, Path], kind: str) -> None:
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 3, "output_type": "pt"}
    asked |= {"image": torch.full((3, 64, 64), 0.4), "strength": 1.0} if kind == "refiner" else {}
    folder = TextToImage.from_pretrained(folders[kind], device="cpu")
    file = TextToImage.from_pretrained(files[kind], device="cpu", config=folders[kind])
    assert torch.equal(file(PROMPTS, **asked).images, folder(PROMPTS, **asked).images)
    for ours, theirs in zip(file.model.parts().items(), folder.model.parts().items(), strict=True):
        assert ours[0] == theirs[0] and type(ours[1]) is type(theirs[1])


def test_stock_reads_the_files_we_write_for_the_tests(files: dict[str, Path], folders: dict[str, Path]) -> None:
    """Or we would read no one else's."""
    stock = StableDiffusionPipeline.from_single_file(str(files["1"]), config=str(folders["1"]), local_files_only=True)
    weights = load_file(folders["1"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stock.unet.state_dict().items())


def test_what_is_saved_is_a_folder(files: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    file = TextToImage.from_pretrained(files["1"], device="cpu", config=folders["1"])
    again = TextToImage.from_pretrained(file.save(tmp_path / "saved"), device="cpu")
    asked: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(file(SHORT, **asked).images, again(SHORT, **asked).images)


def test_a_record_names_the_configurations(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TextToImage.from_pretrained(files["1"], device="cpu", config=folders["1"])(
        SHORT, seed=1, num_inference_steps=2
    )
    assert result.records[0]["config"] == str(folders["1"])
    assert isinstance(result.images, list)
    write_png(result.images[0], tmp_path / "one.png", result.records[0])
    reproduce(tmp_path / "one.png")
    assert "painted again" in capsys.readouterr().out


def test_a_hash_is_of_weights_and_configurations(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folders["1"], tmp_path / "other"))
    before = single_file.load(files["1"], config=other).hash
    assert before == single_file.load(files["1"], config=folders["1"]).hash
    edited(other / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert single_file.load(files["1"], config=other).hash != before
    assert facts_of(str(files["1"]), str(folders["1"]))["hash"] == before


@pytest.mark.parametrize("kind", KINDS)
def test_info_reads_headers_alone(files: dict[str, Path], folders: dict[str, Path], kind: str) -> None:
    file, folder = facts_of(str(files[kind]), str(folders[kind])), facts_of(str(folders[kind]))
    assert file["family"] == folder["family"]
    for part in ("unet", "vae"):
        assert file["parts"][part]["parameters"] == folder["parts"][part]["parameters"] > 0
        assert file["parts"][part]["bytes"] == 4 * file["parts"][part]["parameters"]  # without the header's
    assert file["told"]["scheduler"] == folder["told"]["scheduler"]


# --- which family a file is of ---------------------------------------------------------------------------------------


def test_a_family_is_told_from_names_and_shapes(files: dict[str, Path]) -> None:
    named = {kind: layout_of(path, single_file.shapes(path)).name for kind, path in files.items()}
    assert named == {
        "1": "Stable Diffusion 1",
        "2": "Stable Diffusion 2",
        "xl": "Stable Diffusion XL",
        "refiner": "Stable Diffusion XL's refiner",
    }


def without(prefix: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(prefix)]


def with_more(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: torch.zeros(1)})


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
WRONG: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (without(FIRST), "is of no family known here; single files are read of: Stable Diffusion 1, .* 2, .* XL"),
    (without("cond_stage_model."), "is of no family known here"),
    (without("first_stage_model."), "is of Stable Diffusion 1 and has no vae; it is not complete"),
    (lambda weights: weights.update({FIRST: torch.zeros(8, 9, 3, 3)}), "takes 9 channels, as those for inpainting"),
    (with_more("lora_unet_x.alpha"), "is of a LoRA, which load_lora takes"),
    (with_more("control_model.x"), "is of a ControlNet"),
    (with_more("edm_mean"), "is of Playground 2.5"),
    (with_more("model.diffusion_model.label_emb.0.0.weight"), "has a UNet with a class input"),
    (without("model.diffusion_model.out."), "unet of model file .* is damaged: weights .*conv_out.bias.* are missing"),
    (
        without("first_stage_model.quant_conv.bias"),
        "vae of model file .* is damaged: weight quant_conv.bias is missing",
    ),
    (
        lambda weights: weights.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
        r"weight conv_out.bias \(5,\) is of another shape",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_cannot_be_read_is_refused_in_a_line(
    files: dict[str, Path],
    folders: dict[str, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    weights = load_file(files["1"])
    change(weights)
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(tmp_path / "wrong.safetensors", device="cpu", config=folders["1"])
    assert "\n" not in str(caught.value)


def test_files_that_are_not_safetensors(files: dict[str, Path], tmp_path: Path) -> None:
    for name, message in (
        ("model.ckpt", "is pickle and is never read; convert it to .safetensors"),
        ("model.gguf", "is not a .safetensors file"),
        ("cut.safetensors", "cut.safetensors' is damaged"),
    ):
        (tmp_path / name).write_bytes(files["1"].read_bytes()[:1000])
        with pytest.raises(ValueError, match=message) as caught:
            TextToImage.from_pretrained(tmp_path / name, device="cpu")
        assert "\n" not in str(caught.value)


def test_configurations_that_do_not_fit(files: dict[str, Path], folders: dict[str, Path]) -> None:
    for config, message in (
        (None, "of model file .* is damaged: weights .* and [0-9]+ more are missing"),  # those of the full size
        (folders["xl"], "is of a StableDiffusionXLPipeline, and the file is Stable Diffusion 1's"),
        ("stable-diffusion-9", "is no folder with a model_index.json; give one, or one of: stable-diffusion-2-1, "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TextToImage.from_pretrained(files["1"], device="cpu", config=config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is for a single file"):
        TextToImage.from_pretrained(folders["1"], device="cpu", config=folders["1"])


def test_weights_that_nothing_reads_are_in_the_log(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "more.safetensors"
    more = {name: torch.zeros(1) for name in ("model_ema.x", *(f"sparkle.{k}" for k in range(6)))}
    save_file(load_file(files["1"]) | more, path)
    TextToImage.from_pretrained(path, device="cpu", config=folders["1"])
    assert "weights sparkle.0, sparkle.1, sparkle.2, sparkle.3, sparkle.4 and 1 more are not read" in caplog.text
    save_file(load_file(files["1"]) | {"v_pred": torch.zeros(0)}, path)
    with pytest.raises(ValueError, match="says 'v_pred' and so predicts v; give config=FOLDER"):
        TextToImage.from_pretrained(path, device="cpu")
    TextToImage.from_pretrained(path, device="cpu", config=folders["1"])


# --- the configurations that come with the package -------------------------------------------------------------------


def test_every_layout_has_its_configurations() -> None:
    for layout in LAYOUTS:
        index = json.loads((CONFIGS / layout.config / "model_index.json").read_text())
        assert index["_class_name"] == layout.pipeline


@pytest.mark.parametrize(
    ("config", "part", "padding"),
    [
        ("stable-diffusion-v1-5", "tokenizer", 49407),
        ("stable-diffusion-2-1", "tokenizer", 0),
        ("stable-diffusion-xl-base-1.0", "tokenizer_2", 0),
    ],
)
def test_the_vocabulary_is_clips(config: str, part: str, padding: int) -> None:
    tokenizer = tokenizer_of(CONFIGS / config / part)
    assert tokenizer.model_max_length == 77
    ids = tokenizer("A photo of a  CAT", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70  # as openai's CLIP has it
