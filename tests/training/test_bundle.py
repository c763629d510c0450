"""Four tiny parts trained through the command line and put together: stock diffusers and ours both paint with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableUnCLIPPipeline, UNet2DConditionModel
from safetensors import safe_open

from gen import TextToImage, command
from gen.adapters import drafts
from gen.facts import facts_of
from gen.part import load_part
from tests.training.tiny_recipes import WIDTH, recipes, written
from training.bundle import BundleRecipe, bundle
from training.recipe import RecipeError, check

PARTS = (
    *("prior", "prior_text_encoder", "prior_tokenizer", "prior_scheduler", "image_normalizer", "text_encoder"),
    *("image_noising_scheduler", "tokenizer", "unet", "scheduler", "vae", "clip"),
)


@pytest.fixture(scope="module")
def bundled(trained: Path) -> Path:
    return trained / "bundled"


def test_the_folder_has_every_part(bundled: Path) -> None:
    index = json.loads((bundled / "model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPPipeline"
    assert {name for name in index if not name.startswith("_")} == set(PARTS) - {"clip"}
    assert {path.name for path in bundled.iterdir()} == {*PARTS, "model_index.json", "unclip.json"}
    assert not list(bundled.parent.glob("bundled.*"))


def test_weights_are_float16_and_nothing_is_pickled(bundled: Path) -> None:
    files = [path for path in bundled.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 7
    for path in weights:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118 - no mapping
        assert kinds <= {torch.float16, torch.int64}, path
    for part in ("clip", "text_encoder", "prior_text_encoder"):
        assert json.loads((bundled / part / "config.json").read_text())["dtype"] == "float32"


def test_stock_diffusers_paints_without_being_told_anything(bundled: Path) -> None:
    pipeline = StableUnCLIPPipeline.from_pretrained(bundled)
    pipeline.set_progress_bar_config(disable=True)
    painted = pipeline("a red circle", num_inference_steps=2, prior_num_inference_steps=2, output_type="np").images
    assert painted.shape == (1, 64, 64, 3) and painted.std() > 0


def test_ours_paints_and_loads_the_text_towers_once(bundled: Path) -> None:
    model = TextToImage.from_pretrained(str(bundled))
    for prior in (True, False):
        result = model("a red circle", num_images_per_prompt=2, seed=0, prior=prior)
        assert len(result.images) == 2 and result.scores is not None
    networks = model.model
    weights = [
        tower.text_model.embeddings.token_embedding.weight if hasattr(tower, "text_model") else
        tower.embeddings.token_embedding.weight
        for tower in (networks.text.encoder, networks.prior.text_encoder, networks.clip.model)
    ]  # fmt: skip
    assert len({weight.data_ptr() for weight in weights}) == 1


def test_the_card_knows_its_words(bundled: Path) -> None:
    card = json.loads((bundled / "unclip.json").read_text())
    assert {"a", "circle", "red", "large"} <= set(card["words"]) and "dog" not in card["words"]
    assert card["knows"] == "a few Shapes, and those badly"
    assert card["defaults"]["num_inference_steps"] == 2


def test_generate_paints_with_it(bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["generate", "a red circle", "-n", "2", "--keep", "1", "--model", str(bundled), "--out", str(out)]
    assert command.main([*words, "--quiet"]) == 0
    assert len(list(out.glob("*.png"))) >= 1


def test_a_bundle_is_replaced_whole_and_another_folder_never(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    fields = recipes(few_shapes, trained)["bundle"] | {"out": str(tmp_path / "model")}
    (tmp_path / "scores.json").write_text('{"one object": 0.5}')
    assert bundle(check(BundleRecipe, fields)) == tmp_path / "model"
    bundle(check(BundleRecipe, fields | {"scores": str(tmp_path / "scores.json"), "dtype": "float32"}))
    assert json.loads((tmp_path / "model" / "unclip.json").read_text())["scores"] == {"one object": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "scores.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"scores.json/model cannot be written .*; choose another folder"):
        bundle(check(BundleRecipe, fields | {"out": str(tmp_path / "scores.json" / "model")}))
    with pytest.raises(RecipeError, match=r"out '.*mine' exists and is no model folder"):
        bundle(check(BundleRecipe, fields | {"out": str(tmp_path / "mine")}))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("rank", [None, 2])
def test_a_network_for_drafts_goes_along(few_shapes: Path, trained: Path, tmp_path: Path, rank: int | None) -> None:
    fields = recipes(few_shapes, trained)["bundle"] | {"out": str(tmp_path / "model")}
    draft = trained / "draft" / "model"
    if rank is not None:
        base = load_part(UNet2DConditionModel, trained / "decoder" / "model", "cpu", torch.float32)
        whole, draft = drafts.read(draft, base), tmp_path / "draft"
        drafts.save_low_rank(whole, base, rank, draft)
    bundle(check(BundleRecipe, fields | {"draft": str(draft)}))
    model = TextToImage.from_pretrained(str(tmp_path / "model"))
    assert model.model.drafter is not None
    assert drafts.is_low_rank(tmp_path / "model" / drafts.FOLDER) == (rank is not None)
    parts = facts_of(str(tmp_path / "model"))["parts"]
    assert parts["draft_unet"]["class"] == ("UNet2DConditionModel" if rank is None else "LoRA")
    assert parts["draft_unet"]["parameters"] > 0
    assert (model.model.drafter.num_inference_steps, model.model.drafter.guidance_scale) == (2, 2.0)
    result = model(
        "a red circle", num_images_per_prompt=8, keep=1, seed=0, prior=False, search="draft", num_inference_steps=4
    )
    assert result.account.evaluations["decoder"] == 8 * 2 + 2 * 2 * 4
    StableUnCLIPPipeline.from_pretrained(tmp_path / "model")


def test_parts_that_do_not_fit_are_refused(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    fields = recipes(few_shapes, trained)["bundle"] | {"out": str(tmp_path / "model")}
    for part in ("clip", "vae", "prior", "decoder", "draft"):
        with pytest.raises(ValueError, match="nowhere holds no trained part"):
            bundle(check(BundleRecipe, fields | {part: "nowhere"}))
    vae = recipes(few_shapes, tmp_path)["vae"]
    vae["network"] = vae["network"] | {"latent_channels": 8}
    assert command.main(["train", "vae", "--recipe", str(written(vae, tmp_path)), "train.steps=1"]) == 0
    with pytest.raises(RecipeError, match=r"/model: unet in_channels is 4, but the other parts need 8$"):
        bundle(check(BundleRecipe, fields | {"vae": str(tmp_path / "vae" / "model")}))
    prior = Path(shutil.copytree(trained / "prior" / "model", tmp_path / "prior"))
    (prior / "diffusion_pytorch_model.safetensors").rename(prior / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin, which is pickle and is never read"):
        bundle(check(BundleRecipe, fields | {"prior": str(prior)}))
    assert not (tmp_path / "model").exists()


def test_defaults_that_it_cannot_paint_with_are_refused(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    fields = recipes(few_shapes, trained)["bundle"] | {"out": str(tmp_path / "model")}
    with pytest.raises(RecipeError, match=r"model/unclip\.json: num_inference_steps=0 is out of range"):
        bundle(check(BundleRecipe, fields | {"defaults": {"num_inference_steps": 0}}))
    assert not (tmp_path / "model").exists()


def test_a_clip_of_another_width_is_refused(few_shapes: Path, trained: Path, tmp_path: Path) -> None:
    """Whose text states are as wide, so that nothing but image embeddings tells them apart."""
    clip = recipes(few_shapes, tmp_path)["clip"] | {"projection_dim": 2 * WIDTH}
    assert command.main(["train", "clip", "--recipe", str(written(clip, tmp_path)), "train.steps=1"]) == 0
    fields = recipes(few_shapes, trained)["bundle"] | {"out": str(tmp_path / "model")}
    with pytest.raises(RecipeError, match=r"image embeddings of width 16, but .* makes them of 32; train it on it"):
        bundle(check(BundleRecipe, fields | {"clip": str(tmp_path / "clip" / "model")}))
    assert not (tmp_path / "model").exists()
