"""Recipes: every bundled one is right, and whatever is wrong with another is one line that names the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import training
from tests.training.tiny_recipes import recipes
from training.bundle import BundleRecipe
from training.clip_task import ClipTask
from training.decoder_task import DecoderRecipe, Kinds
from training.parts import PART_TASKS
from training.recipe import Recipe, RecipeError, Section, check, load_recipe
from training.vae_task import VaeRecipe, VaeTask

BUNDLED = sorted((Path(training.__file__).parent / "recipes").glob("*.yaml"))


def section(part: str) -> type[Section]:
    return BundleRecipe if part == "bundle" else PART_TASKS[part][0]


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return recipes(tmp_path / "data", tmp_path / "out")


def wrong(part: str, fields: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check(section(part), fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_there_is_a_bundled_recipe_for_every_part() -> None:
    assert {load_recipe(path)["task"] for path in BUNDLED} >= set(PART_TASKS)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_bundled_recipe_is_right(path: Path) -> None:
    fields = load_recipe(path)
    recipe = check(section(fields["task"]), fields)
    assert fields["task"] in path.stem.split("_")
    if isinstance(recipe, Recipe):
        assert recipe.train.warmup_steps < recipe.train.steps


@pytest.mark.parametrize("part", ["clip", "vae", "prior", "decoder", "draft", "bundle"])
def test_tiny_recipes_are_right_and_each_lacks_what_is_taken_away(part: str, fields: dict[str, Any]) -> None:
    recipe = fields[part]
    check(section(part), recipe)
    for key in ("out", "data"):
        assert wrong(part, {k: v for k, v in recipe.items() if k != key}) == f"recipe key '{key}' is missing"


def test_unknown_keys_are_told_with_those_there_are(fields: dict[str, Any]) -> None:
    message = wrong("vae", fields["vae"] | {"kl_wieght": 1})
    assert message.startswith("recipe key 'kl_wieght' is unknown; choose from: ") and "kl_weight" in message
    recipe = fields["vae"] | {"train": fields["vae"]["train"] | {"lr": 1}}
    message = wrong("vae", recipe)
    assert message.startswith("recipe key 'train.lr' is unknown; choose from: ") and "learning_rate" in message
    message = wrong("decoder", fields["decoder"] | {"kinds": {"text_only": 1.0}})
    assert message == "recipe key 'kinds.text_only' is unknown; choose from: both, image, none, text"


@pytest.mark.parametrize(
    ("part", "key", "name"),
    [
        ("vae", "network", "AutoencoderKL"),
        ("prior", "network", "PriorTransformer"),
        ("prior", "scheduler", "DDIMScheduler"),
        ("decoder", "network", "UNet2DConditionModel"),
        ("clip", "text", "CLIPTextConfig"),
        ("clip", "vision", "CLIPVisionConfig"),
    ],
)
def test_options_of_a_library_class_are_checked(fields: dict[str, Any], part: str, key: str, name: str) -> None:
    """Transformers would take an unknown option silently and train a network of another size."""
    recipe = fields[part] | {key: fields[part][key] | {"num_hiden_layers": 3}}
    message = wrong(part, recipe)
    assert message.startswith(f"recipe key '{key}': 'num_hiden_layers' is no option of {name}; choose from: ")


def test_options_that_follow_from_other_parts_are_refused(fields: dict[str, Any]) -> None:
    recipe = fields["decoder"] | {"network": fields["decoder"]["network"] | {"in_channels": 4}}
    assert "'in_channels' of UNet2DConditionModel follows from the other parts; leave it out" in wrong(
        "decoder", recipe
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "recipe key 'train.steps' is 'many': "),
        ("train.steps=0", "recipe key 'train.steps' is 0: "),
        ("train.steps=1.5", "recipe key 'train.steps' is 1.5: "),
        ("train.learning_rate=-1", "recipe key 'train.learning_rate' is -1: "),
        ("train.schedule=linear", "recipe key 'train.schedule' is 'linear': Input should be 'cosine' or 'constant'"),
        ("train.mixed_precision=fp8", "recipe key 'train.mixed_precision' is 'fp8': "),
        ("train.ema_decay=1", "recipe key 'train.ema_decay' is 1: "),
        ("train.max_grad_norm=0", "recipe key 'train.max_grad_norm' is 0: "),
        ("network=8", "recipe key 'network' is 8: "),
        ("train=[]", "recipe key 'train' is []: "),
        ("resolution=60", "recipe: resolution is 60 and the autoencoder divides it by 8; choose a multiple of 8"),
    ],
)
def test_wrong_values(tmp_path: Path, fields: dict[str, Any], override: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields["vae"]))
    assert wrong("vae", load_recipe(tmp_path / "recipe.yaml", [override])).startswith(message)


def test_overrides_are_yaml_and_reach_inside(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields["vae"]))
    overrides = [
        *("train.steps=7", "train.learning_rate=3e-4", "train.max_grad_norm=null", "kl_weight=0.5"),
        *("network.latent_channels=8", "out=a=b"),
    ]
    recipe = check(VaeRecipe, load_recipe(path, overrides))
    assert recipe.train.steps == 7 and recipe.train.learning_rate == 3e-4 and recipe.train.max_grad_norm is None
    assert recipe.kl_weight == 0.5 and recipe.network["latent_channels"] == 8 and recipe.out == "a=b"
    assert recipe.network["norm_num_groups"] == 4  # the rest stays
    for override, message in (
        ("train.steps", r"override 'train.steps' has no '='; write key=value"),
        ("out.inner=3", r"recipe key 'out.inner' goes through 'out', which is a value"),
        ("train.steps=[", r"override 'train.steps=\[' is not YAML"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path, [override])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    for content, message in (
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"", "must be a mapping"),
    ):
        (tmp_path / "recipe.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(tmp_path / "recipe.yaml")
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_shares_of_kinds_sum_to_one(fields: dict[str, Any]) -> None:
    assert Kinds().both + Kinds().text + Kinds().image + Kinds().none == pytest.approx(1)
    kinds = {"both": 0.5, "text": 0.5, "image": 0.1, "none": 0.1}
    message = wrong("decoder", fields["decoder"] | {"kinds": kinds})
    assert message == "recipe key 'kinds': the shares of kinds sum to 1.2; they must sum to 1"
    recipe = check(DecoderRecipe, fields["decoder"] | {"kinds": dict.fromkeys(kinds, 0.25)})
    assert recipe.kinds == Kinds(both=0.25, text=0.25, image=0.25, none=0.25)


def test_a_recipe_of_another_part_is_refused(fields: dict[str, Any]) -> None:
    assert "recipe key 'task' is 'vae'" in wrong(
        "clip", fields["vae"] | {"projection_dim": 1, "text": {}, "vision": {}}
    )


def test_the_digest_names_what_is_trained_and_not_where_it_is_written(fields: dict[str, Any]) -> None:
    def digest(**changes: Any) -> str:
        train = fields["vae"]["train"] | changes.pop("train", {})
        return check(VaeRecipe, fields["vae"] | changes | {"train": train}).digest()

    same = [
        *(digest(), digest(out="elsewhere"), digest(data="moved")),
        digest(train={"log_every": 7, "save_every": 8, "sheet_every": 9, "keep_checkpoints": 3, "workers": 2}),
    ]
    assert len(set(same)) == 1
    changes = [{"steps": 99}, {"seed": 1}, {"optimizer": "muon"}]
    other = [*(digest(train=change) for change in changes), digest(kl_weight=0.5), digest(resolution=32)]
    assert len({*same, *other}) == 6


def test_options_that_do_not_go_together_are_one_line(few_shapes: Path, tmp_path: Path) -> None:
    """Each option is known, but together they make no network; what the library says is passed on."""
    fields = recipes(few_shapes, tmp_path)
    vae = fields["vae"] | {"network": fields["vae"]["network"] | {"norm_num_groups": 3}}
    with pytest.raises(RecipeError, match="recipe key 'network' makes no AutoencoderKL: ") as caught:
        VaeTask(check(VaeRecipe, vae))
    assert "\n" not in str(caught.value)
    clip = fields["clip"] | {"text": fields["clip"]["text"] | {"num_attention_heads": 3}}
    with pytest.raises(RecipeError, match="recipe key 'text, vision' makes no CLIP"):
        ClipTask(check(PART_TASKS["clip"][0], clip))  # type: ignore[arg-type]
