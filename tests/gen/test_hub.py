"""Hub ids: only what a model is loaded from is fetched; a local cache stands in for the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import clip_core.hub
from gen import TextToImage, hub
from gen.adapters.file import found
from gen.model_folder import LICENCES, find
from gen.weights import of_one_variant, weight_files
from tests.hub import COMMIT, cached
from tests.tiny import make_tiny_stable_diffusion

UNET = "unet/diffusion_pytorch_model"

# As the published repositories of Stable Diffusion 1.5 and XL list them, shortened.
PUBLISHED = [
    *(".gitattributes", "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    *("feature_extractor/preprocessor_config.json", "safety_checker/config.json", "safety_checker/model.safetensors"),
    *("scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors"),
    *("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/model.onnx"),
    *("text_encoder/flax_model.msgpack", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"),
    *("tokenizer/vocab.json", "unet/config.json", f"{UNET}.bin", f"{UNET}.fp16.bin", f"{UNET}.fp16.safetensors"),
    *(f"{UNET}.non_ema.safetensors", f"{UNET}.safetensors", "unet/sub/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors"),
]
PARTS = ["scheduler", "text_encoder", "tokenizer", "unet", "vae", "clip"]


def test_only_what_is_loaded_is_fetched() -> None:
    assert hub.needed(PUBLISHED, PARTS) == [
        "scheduler/scheduler_config.json",
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/merges.txt", "tokenizer/special_tokens_map.json", "tokenizer/vocab.json"),
        *("unet/config.json", f"{UNET}.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),  # the only one
    ]


@pytest.mark.parametrize(
    ("names", "chosen", "variant"),
    [
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"], None),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"], "fp16"),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], ["model.fp16.safetensors"], "fp16"),
        (
            ["m-00002-of-00002.safetensors", "m.fp16-00001-of-00001.safetensors", "m-00001-of-00002.safetensors"],
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
            None,
        ),
        ([], [], None),
    ],
)
def test_one_variant(names: list[str], chosen: list[str], variant: str | None) -> None:
    assert of_one_variant(names) == (chosen, variant)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with the repository someone/tiny in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return Path(shutil.copytree(folder, cached(tmp_path, "someone", "tiny")))


ASKED: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "pt"}


def test_a_hub_id_is_loaded_from_the_cache(cache: Path, folder: Path) -> None:
    model, local = (TextToImage.from_pretrained(name, device="cpu") for name in ("someone/tiny", folder))
    assert torch.equal(model("a star", **ASKED).images, local("a star", **ASKED).images)
    assert model.hash == local.hash


def test_what_is_asked_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network there is a list of files, and of those the needed ones are asked for."""
    listed = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()]
    asked: list[list[str]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(cache)

    monkeypatch.setattr(
        clip_core.hub, "list_repo_files", lambda repository: [*listed, "unet/diffusion_pytorch_model.bin"]
    )
    monkeypatch.setattr(clip_core.hub, "snapshot_download", snapshot)
    TextToImage.from_pretrained("someone/tiny", device="cpu")
    assert set(asked[0]) == {*listed, "unclip.json", *LICENCES}


def test_without_network_the_cache_will_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the hub's client raises then."""

    def unreachable(repository: str) -> list[str]:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(clip_core.hub, "list_repo_files", unreachable)
    assert find("someone/tiny") == cache
    # also where the hub has told the client of files that were never fetched
    trees = cache.parent.parent / "trees"
    trees.mkdir()
    files = {"pytorch_model.bin": {"size": 1, "blob_id": "0" * 40}}
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert find("someone/tiny") == cache


def test_a_repository_that_is_not_there_is_named(cache: Path) -> None:
    with pytest.raises(ValueError, match="model 'someone/else' is no folder here and cannot be fetched") as caught:
        TextToImage.from_pretrained("someone/else", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_variant_that_is_the_only_one_is_read(folder: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for path in half.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert [path.name for path in weight_files(half / "unet")] == ["diffusion_pytorch_model.fp16.safetensors"]
    model, local = (TextToImage.from_pretrained(name, device="cpu") for name in (half, folder))
    assert torch.equal(model("a star", **ASKED).images, local("a star", **ASKED).images)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(cache: Path, tmp_path: Path, folder: Path) -> Path:
    """A repository someone/added with a LoRA as peft saves it, and a learned word below, as a cache has them."""
    there = cached(tmp_path, "someone", "added")
    lora = {f"base_model.model.conv_in.lora_{side}.weight": torch.ones(shape) for side, shape in LORA.items()}
    width = TextToImage.from_pretrained(folder, device="cpu").model.unet.config.cross_attention_dim
    (there / "words").mkdir(parents=True)
    save_file(lora, there / "adapter_model.safetensors")
    (there / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1.0}))
    save_file({"<cat>": torch.ones(1, width)}, there / "words" / "cat.safetensors")
    return there


LORA = {"A": (1, 4, 3, 3), "B": (8, 1, 1, 1)}


def test_adapters_are_loaded_from_the_cache(adapters: Path, folder: Path) -> None:
    model = TextToImage.from_pretrained(folder, device="cpu")
    before = model.model.unet.conv_in.weight.clone()
    model.load_lora("someone/added", 0.5)
    torch.testing.assert_close(model.model.unet.conv_in.weight, before + 0.5)
    model.load_lora("someone/added/adapter_model.safetensors", 0.5)
    torch.testing.assert_close(model.model.unet.conv_in.weight, before + 1.0)
    model.load_textual_inversion("someone/added/words/cat.safetensors")
    assert [each.name for each in model.adapters] == [
        "someone/added",
        "someone/added/adapter_model.safetensors",
        "someone/added/words/cat.safetensors",
    ]
    for name, message in (
        ("someone/added/other.safetensors", "is no file of that repository, as far as it can be reached"),
        ("someone/nothing", "is no file here and cannot be fetched from the hub"),
    ):
        with pytest.raises(ValueError, match=f"embedding '{name}' {message}") as caught:
            model.load_textual_inversion(name)
        assert "\n" not in str(caught.value)


def test_what_is_asked_of_the_hub_for_an_adapter(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and, of a LoRA, the configuration that peft puts beside it."""
    asked: list[list[str]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(adapters)

    listed = [path.relative_to(adapters).as_posix() for path in adapters.rglob("*") if path.is_file()]
    monkeypatch.setattr(clip_core.hub, "list_repo_files", lambda repository: [*listed, "adapter_model.bin"])
    monkeypatch.setattr(clip_core.hub, "snapshot_download", snapshot)
    assert found("LoRA", "someone/added", "usual", ["*adapter_config.json"]).path.parent == adapters
    found("embedding", "someone/added/words/cat.safetensors", "usual")
    assert asked == [["adapter_model.safetensors", "*adapter_config.json"], ["words/cat.safetensors"]]
