"""Learned words: stock diffusers' pictures from every layout of file, records, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from clip_core.text import TextTower, spelled_out
from gen import TextToImage, command
from gen.picture import read_png
from tests.stock import SEED, apart, assert_same, edited, stock_of
from tests.tiny import WIDTH, make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl, make_tiny_stable_unclip

CAT = "a <cat> above a star"
PROMPTS = [CAT, "a star"]


def vectors(number: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inversion")
    return {"1": make_tiny_stable_diffusion(root / "1"), "xl": make_tiny_stable_diffusion_xl(root / "xl")}


def loaded(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("weights", "token"),
    [
        ({"<cat>": vectors(1)[0]}, None),
        ({"<cat>": vectors(3)}, None),
        ({"<other>": vectors(2)}, "<cat>"),
        ({"emb_params": vectors(2)}, "<cat>"),
    ],
    ids=["one vector", "three vectors", "renamed", "AUTOMATIC1111"],
)
def test_stock_paints_the_same(
    folders: dict[str, Path], tmp_path: Path, weights: dict[str, Tensor], token: str | None
) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    model, stock = loaded(folders["1"]), stock_of(StableDiffusionPipeline, folders["1"])
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 5, "output_type": "latent"}
    before = model(CAT, **asked).images
    model.load_textual_inversion(tmp_path / "a.safetensors", token)
    stock.load_textual_inversion(str(tmp_path), weight_name="a.safetensors", token=token)
    assert_same(model, stock, PROMPTS, 1, negative_prompt=["", "<cat> on black"])
    assert apart(model(CAT, **asked).images, before) > 1e-2
    assert apart(model(CAT.replace("<cat>", "<CAT>"), **asked).images, model(CAT, **asked).images) == 0
    # what is saved, stock reads with the word in it
    again = stock_of(StableDiffusionPipeline, model.save(tmp_path / "saved"))
    assert_same(model, again, PROMPTS, 1)


def test_both_towers_of_xl(folders: dict[str, Path], tmp_path: Path) -> None:
    model, stock = loaded(folders["xl"]), stock_of(StableDiffusionXLPipeline, folders["xl"])
    both = {"clip_l": vectors(2), "clip_g": vectors(2, model.model.parts()["text_encoder_2"].config.hidden_size, 1)}
    save_file(both, tmp_path / "cat.safetensors")
    model.load_textual_inversion(tmp_path / "cat.safetensors", "<cat>")
    stock.load_textual_inversion(both["clip_l"], token="<cat>")
    second = {"text_encoder": stock.text_encoder_2, "tokenizer": stock.tokenizer_2}
    stock.load_textual_inversion(both["clip_g"], token="<cat>", **second)
    assert_same(model, stock, PROMPTS, 1)
    named = loaded(folders["xl"])
    named.load_textual_inversion(tmp_path / "cat.safetensors")  # nothing says a word, so the file's name does
    assert named.adapters[0].token == "cat"


def test_several_words_and_how_they_are_spelled(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["1"])
    for place, (word, number) in enumerate({"<cat>": 3, "<cat>s": 1, "dog": 2}.items()):
        save_file({word: vectors(number, seed=place)}, tmp_path / "a.safetensors")
        model.load_textual_inversion(tmp_path / "a.safetensors")
    text = model.model.parts()["tokenizer"], model.model.parts()["text_encoder"]
    assert spelled_out(text[0], "a <cat>, <cat>s, DOG") == "a <cat> <cat>_1 <cat>_2, <cat>s, dog dog_1"
    assert spelled_out(text[0], "<cat>_1") == "<cat>_1"
    plain = loaded(folders["1"]).model.parts()["tokenizer"]
    assert spelled_out(plain, "a <cat>") == "a <cat>"
    # the vectors stand where the word does
    ids = TextTower(*text).tokenizer(spelled_out(text[0], "a <cat>")).input_ids[-4:-1]
    torch.testing.assert_close(text[1].get_input_embeddings().weight[ids], vectors(3))


def test_a_tower_of_an_old_configuration_pools_at_the_end_still(tmp_path: Path) -> None:
    """Published XL folders say an eos_token_id of 2: the highest id is pooled, which a learned word would be."""
    folder = make_tiny_stable_diffusion_xl(tmp_path / "xl")
    model = loaded(folder)
    eos = model.model.parts()["tokenizer_2"].eos_token_id
    before = model.model.parts()["text_encoder_2"]
    width = before.config.hidden_size
    edited(folder / "text_encoder_2" / "config.json", eos_token_id=2)
    old = loaded(folder)
    save_file({"clip_l": vectors(1), "clip_g": vectors(1, width)}, tmp_path / "a.safetensors")
    for each in (model, old):
        each.load_textual_inversion(tmp_path / "a.safetensors", "<cat>")
        assert each.model.parts()["text_encoder_2"].config.eos_token_id == eos
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 2, "output_type": "latent"}
    assert apart(old(CAT, **asked).images, model(CAT, **asked).images) == 0


def test_what_ranks_and_the_prior_do_not_learn_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(make_tiny_stable_unclip(tmp_path / "model"))
    clip, prior = model.model.clip, model.model.prior
    assert clip is not None and prior is not None
    texts = clip.text(CAT).embedding, prior.text([CAT]).tokens
    save_file({"<cat>": vectors(2)}, tmp_path / "a.safetensors")
    model.load_textual_inversion(tmp_path / "a.safetensors")
    assert torch.equal(clip.text(CAT).embedding, texts[0]) and torch.equal(prior.text([CAT]).tokens, texts[1])
    assert "the prior does not know '<cat>'" in caplog.text
    assert model(CAT, seed=1, num_images_per_prompt=2, num_inference_steps=2, prior=False).scores is not None


def test_the_command_line_and_its_record(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"<dog>": vectors(2)}, path)
    arguments = ["generate", CAT, "-n", "1", "--steps", "2", "--model", str(folders["1"]), "--quiet"]
    arguments += ["--embedding", f"{path}:<cat>", "--embedding", str(path), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    picture = Path(capsys.readouterr().out.strip())
    record = read_png(picture)[1]
    assert [(each["kind"], each["token"]) for each in record["adapters"]] == [
        ("embedding", "<cat>"),
        ("embedding", "<dog>"),
    ]
    assert command.main(["reproduce", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] <= 1


def test_files_that_do_not_fit_change_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def refused(kind: str, weights: dict[str, Tensor], message: str, token: str | None = None) -> None:
        save_file(weights, path)
        model = loaded(folders[kind])
        known = len(model.model.parts()["tokenizer"])
        with pytest.raises(ValueError, match=message) as error:
            model.load_textual_inversion(path, token)
        assert "\n" not in str(error.value)
        assert len(model.model.parts()["tokenizer"]) == known and model.adapters == ()

    refused("1", {"<cat>": vectors(1, 20)}, "is of another base model: it is 20 wide, text_encoder 16")
    refused(
        "1", {"clip_l": vectors(1), "clip_g": vectors(1)}, r"holds clip_g \(1, 16\), .*; this model takes one tensor"
    )
    refused("xl", {"<cat>": vectors(1)}, "this model takes clip_l and clip_g of shape")
    refused("xl", {"clip_l": vectors(1), "clip_g": vectors(2, 24)}, "are 1 for text_encoder, 2 for text_encoder_2")
    refused("1", {"<cat>": vectors(1)[None]}, r"holds <cat> \(1, 1, 16\)")
    refused("1", {}, "holds nothing")
    refused("1", {"<cat>": vectors(1)}, "token 'a cat' is no word", "a cat")
    refused("1", {"<cat>": vectors(1)}, "knows '!' already; give another token", "!")
    refused("1", {"<cat>": vectors(1) / 0}, r"^file '.*a\.safetensors' is damaged: its <cat> has numbers that are not")
    path.unlink()
    with pytest.raises(ValueError, match=r"^embedding '.*' is no file"):
        loaded(folders["1"]).load_textual_inversion(path)


def test_a_tower_of_another_kind_learns_nothing(kandinskys: dict[str, TextToImage], tmp_path: Path) -> None:
    """Kandinsky 2.1's is XLM-RoBERTa's with a projection of its own."""
    model = kandinskys["2.1"]
    parts, adapters = model.model.parts(), model.adapters
    width, known = parts["text_encoder"].transformer.config.hidden_size, len(parts["tokenizer"])
    save_file({"<cat>": vectors(1, width)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is a word of CLIP's; this model's text_encoder is MultilingualCLIP") as error:
        model.load_textual_inversion(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert len(model.model.parts()["tokenizer"]) == known and model.adapters == adapters == ()
