"""Folders: what is loaded once, what is refused by name, and what is written for stock diffusers to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableUnCLIPPipeline
from safetensors.torch import load_file, save_file

from gen import TextToImage, checkpoint
from gen.scheduler import NoiseLevels
from tests.tiny import make_tiny_stable_unclip


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_text_towers_stored_twice_are_loaded_once(tiny: TextToImage) -> None:
    model = tiny.model
    assert model.prior is not None and model.clip is not None
    whole = model.clip.model.text_model
    assert model.text.encoder is whole and model.prior.text_encoder.text_model is whole
    assert model.prior.text_encoder.text_projection is model.clip.model.text_projection


def test_a_tower_of_its_own_is_loaded_as_such(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if "token_embedding" in key)
    weights[name] = weights[name] + 1
    save_file(weights, path, metadata={"format": "pt"})
    model = TextToImage.from_pretrained(folder, device="cpu").model
    assert model.clip is not None and model.text.encoder is not model.clip.model.text_model
    apart = (model.text.encoder.embeddings.token_embedding.weight - weights[name]).abs().max()
    assert apart == 0


def test_without_a_clip_beside_it_a_stock_folder_paints_and_does_not_rank(folder: Path) -> None:
    asked = {"seed": 1, "output_type": "latent"}
    ranked = TextToImage.from_pretrained(folder, device="cpu")("a star", **asked)
    shutil.rmtree(folder / "clip")
    (folder / "unclip.json").unlink()
    model = TextToImage.from_pretrained(folder, device="cpu")
    settings = model.model.abilities.defaults  # stock's own, for want of a card
    assert (settings.num_inference_steps, settings.guidance_scale, settings.prior) == (20, 10.0, True)
    plain = model("a star", num_inference_steps=4, guidance_scale=3.0, prior_num_inference_steps=3, **asked)
    assert torch.allclose(plain.images, ranked.images, atol=1e-5)
    assert plain.scores is None and ranked.scores is not None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(path: Path) -> None:
    path.rename(path.with_name("diffusion_pytorch_model.bin"))


def no_text(path: Path) -> None:
    path.write_text("{")


def without_conv_in(path: Path) -> None:
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (UNET, Path.unlink, "unet' has no .safetensors file; fetch it again"),
    (UNET, cut, "unet/diffusion_pytorch_model.safetensors' is damaged"),
    (UNET, pickled, "is pickle and is never read; save the model with safe_serialization=True"),
    (UNET, without_conv_in, "unet' is damaged: weight conv_in.weight is missing"),
    ("unet/config.json", Path.unlink, "unet/config.json' is missing"),
    ("vae/config.json", no_text, "vae/config.json' is damaged"),
    ("vae", shutil.rmtree, "vae' is missing"),
    ("text_encoder/model.safetensors", cut, "text_encoder/model.safetensors' is damaged"),
    ("clip/model.safetensors", cut, "clip/model.safetensors.* is damaged"),
    ("scheduler/scheduler_config.json", Path.unlink, "scheduler' cannot be loaded"),
    ("tokenizer/tokenizer.json", no_text, "tokenizer/tokenizer.json is damaged"),
    ("tokenizer/tokenizer.json", Path.unlink, "tokenizer/tokenizer.json is missing"),
    ("prior_tokenizer", shutil.rmtree, "prior_tokenizer' is missing"),
    ("tokenizer/tokenizer_config.json", Path.unlink, "model_max_length of the tokenizer is 1.*, text_encoder has 32"),
    ("prior_scheduler/scheduler_config.json", no_text, "prior_scheduler/scheduler_config.json' is damaged"),
    ("model_index.json", Path.unlink, "has no model_index.json"),
    ("model_index.json", no_text, "model_index.json' is damaged"),
    ("unclip.json", no_text, "unclip.json' is damaged"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_missing_and_damaged_files_are_named(
    folder: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder / name)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


def edited(path: Path, **change: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_index.json", {"unet": ["os", "system"]}, "os.system is no class of diffusers or transformers"),
        ("model_index.json", {"unet": ["diffusers", "AutoModel"]}, "diffusers.AutoModel is no class of diffusers"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "DPMSolverSDEScheduler"]},
            "SDEScheduler (needs a package that|is not supp)",
        ),
        ("model_index.json", {"tokenizer": ["transformers", "AutoTokenizer"]}, "AutoTokenizer is no class of"),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, "custom pipeline .*, whose code is never run"),
        ("model_index.json", {"../unet": ["diffusers", "UNet2DConditionModel"]}, "which is no folder beside it"),
        ("text_encoder/adapter_config.json", {}, "has an adapter_config.json, by which peft changes weights"),
        ("model_index.json", {"_class_name": "KolorsPipeline"}, "a KolorsPipeline; ours are: .*StableUnCLIP"),
        ("model_index.json", {"prior_tokenizer": [None, None]}, "prior_tokenizer' is missing from model_index.json"),
        ("model_index.json", {"vae": []}, "vae' is missing from model_index.json"),
        ("unclip.json", {"words": 3}, "unclip.json' is damaged .words is no list"),
        ("unclip.json", {"defaults": [1]}, "unclip.json' is damaged .defaults is no dict"),
        ("unclip.json", {"defaults": {"guidance_interval": 3}}, "guidance_interval=3 is not a pair"),
        ("unclip.json", {"defaults": {"steps": 3}}, "unclip.json: setting 'steps' is unknown"),
        ("unclip.json", {"defaults": {"num_inference_steps": 0}}, "unclip.json: num_inference_steps=0"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding=True is not supported"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type='flow'"),
    ],
)
def test_what_a_folder_must_not_ask_for(folder: Path, name: str, change: dict[str, object], message: str) -> None:
    edited(folder / name, **change)
    with pytest.raises(ValueError, match=message):
        TextToImage.from_pretrained(folder, device="cpu")


def test_a_shard_index_that_names_files_elsewhere(folder: Path) -> None:
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json' names '\.\./vae/.*', which is no file beside it"):
        TextToImage.from_pretrained(folder, device="cpu")


def test_a_shard_index_that_names_no_files(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json' is damaged \(it has no weight_map\)"):
        TextToImage.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ["name_or_path", "prior_model", "clip", "config", "weak_unet", "draft_unet"])
def test_what_can_be_no_name(tiny_folder: Path, name: str) -> None:
    for given in (3, *([None] if name == "name_or_path" else [])):
        with pytest.raises(ValueError, match=f"{name}={given} is of type .*; give a name or a path"):
            TextToImage.from_pretrained(**{"name_or_path": tiny_folder, name: given})  # type: ignore[arg-type]


def test_a_tower_with_other_settings_is_not_shared(folder: Path) -> None:
    """Equal weights, and an activation that one config says and the other leaves to the default."""
    path = folder / "clip" / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["hidden_act"]  # quick_gelu, then
    path.write_text(json.dumps(config))
    edited(folder / "text_encoder" / "config.json", hidden_act="gelu")
    model = TextToImage.from_pretrained(folder, device="cpu").model
    assert model.clip is not None and model.text.encoder is not model.clip.model.text_model
    assert model.text.encoder.config.hidden_act == "gelu"


def test_save_writes_what_stock_loads_and_paints_the_same(tiny: TextToImage, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "saved", dtype=torch.float16)
    assert next(tiny.model.unet.parameters()).dtype == torch.float32  # the model in memory keeps its own
    for path in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    again = TextToImage.from_pretrained(folder, device="cpu")
    assert again.card == tiny.card and again.hash != tiny.hash
    stock = StableUnCLIPPipeline.from_pretrained(folder)  # without arguments, float16 on disk
    assert {module.dtype for module in stock.components.values() if isinstance(module, torch.nn.Module)} == {
        torch.float32
    }
    rounded = again("a star", seed=2, output_type="pt")
    assert (rounded.images - tiny("a star", seed=2, output_type="pt").images).abs().max() < 0.1
    exact = TextToImage.from_pretrained(tiny.save(tmp_path / "exact"), device="cpu")
    before, after = (model("a star", seed=2, output_type="pt") for model in (tiny, exact))
    assert torch.equal(before.images, after.images) and before.scores == after.scores


@pytest.mark.parametrize("is_file", [True, False])
def test_save_takes_a_new_folder_or_an_empty_one(tiny: TextToImage, tmp_path: Path, is_file: bool) -> None:
    there = tmp_path / "there"
    if is_file:
        there.write_text("mine")
    else:
        (there / "unet").mkdir(parents=True)
    with pytest.raises(ValueError, match="there is there already and not empty; give a new folder") as caught:
        tiny.save(there)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "mine" if is_file else [*there.rglob("*")] == [there / "unet"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    saved = tiny.save(tmp_path / "link")
    assert saved == tmp_path / "link"
    assert TextToImage.from_pretrained(tmp_path / "empty", device="cpu").card == tiny.card
    names = {path.name for path in saved.iterdir()}
    assert names == {path.name for path in tiny.save(tmp_path / "new" / "one").iterdir()}  # nothing else is left
    assert {path.name for path in tmp_path.iterdir()} == {"there", "empty", "link", "new"}


def test_save_where_nothing_can_be_made(tiny: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder=None is of type NoneType; give a name or a path"):
        tiny.save(None)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/x"), tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match=rf"folder '{folder}' cannot be written \(.*\); choose another") as caught:
            tiny.save(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), ValueError)]
)
def test_a_save_that_fails_leaves_nothing(
    tiny: TextToImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_there: bool,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    folder = tmp_path / "outer" / "saved"
    if is_there:
        folder.mkdir(parents=True)
    written = checkpoint.save_part

    def some(part: object, folder: Path, dtype: torch.dtype | None) -> None:
        written(part, folder, dtype)
        if folder.name == "unet":
            raise error

    monkeypatch.setattr(checkpoint, "save_part", some)
    with pytest.raises(raised):
        tiny.save(folder)
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if is_there else [])


def test_the_hash_is_of_what_pictures_depend_on(folder: Path) -> None:
    before = checkpoint.load(folder).hash
    edited(folder / "unclip.json", knows="something else")
    assert checkpoint.load(folder).hash == before
    edited(folder / "scheduler" / "scheduler_config.json", beta_end=0.013)
    assert checkpoint.load(folder).hash != before


@pytest.mark.parametrize(
    ("stock", "message"),
    [
        (PNDMScheduler(), r"scheduler PNDMScheduler\(skip_prk_steps=False\) is not supported; choose from: DDIM"),
        (
            DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
            "algorithm_type.*is not supported",
        ),
        (DPMSolverMultistepScheduler(solver_order=1), "solver_order=1"),
        (DDIMScheduler(thresholding=True, clip_sample=False), "thresholding=True"),
    ],
)
def test_schedulers_without_an_equal_here(stock: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseLevels.of(stock, "scheduler")


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    one, same, other = (make_tiny_stable_unclip(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    hashes = [checkpoint.load(path).hash for path in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
