"""The bundled model as it is shipped: its size, stock diffusers' view of it, and that it knows what it says."""

from pathlib import Path

import pytest
import torch
from diffusers import StableUnCLIPPipeline

from gen import TextToImage
from gen.model_folder import find
from samplers.noise import noise
from training.data.checker import read, right
from training.data.suite import load
from training.evaluation.rates import retrieval

FOLDER = find("shapes64")


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.from_pretrained("shapes64", device="cpu")


def test_it_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_text_towers_are_loaded_once(model: TextToImage) -> None:
    family = model.model
    assert family.prior is not None and family.clip is not None
    whole = {id(parameter) for parameter in family.clip.model.parameters()}
    assert {id(parameter) for parameter in family.text.encoder.parameters()} <= whole
    assert {id(parameter) for parameter in family.prior.text_encoder.parameters()} <= whole


@pytest.mark.parametrize("guidance_scale, prior_guidance_scale", [(4.0, 2.0), (1.0, 1.0)])
def test_stock_diffusers_paints_the_same(
    model: TextToImage, monkeypatch: pytest.MonkeyPatch, guidance_scale: float, prior_guidance_scale: float
) -> None:
    stock = StableUnCLIPPipeline.from_pretrained(FOLDER)
    stock.set_progress_bar_config(disable=True)
    width = model.model.embedding_width
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_unclip.randn_tensor"
    monkeypatch.setattr(module, lambda shape, **_: noise([7], "image_noise", 0, (width,)).reshape(shape))
    words = {
        "num_inference_steps": 20,
        "prior_num_inference_steps": 20,
        "guidance_scale": guidance_scale,
        "prior_guidance_scale": prior_guidance_scale,
        "output_type": "pt",
    }
    theirs = stock(
        "two small yellow hearts on black",
        latents=noise([7], "decoder", 0, model.model.latent_shape(model.model.abilities.defaults)),
        prior_latents=noise([7], "prior", 0, (width,)),
        **words,
    ).images
    ours = model("two small yellow hearts on black", seed=7, prior=True, rerank=False, **words).images
    assert isinstance(ours, torch.Tensor)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_its_clip_finds_pictures(model: TextToImage) -> None:
    assert model.model.clip is not None
    found = retrieval(model.model.clip, [prompt for prompt in load() if prompt.group == "retrieval"])
    assert found["text_to_image"]["rate"] >= 0.9


@pytest.mark.parametrize("group", ["one", "relation"])
@pytest.mark.parametrize("prior", [False, True])
def test_it_paints_what_it_is_asked(model: TextToImage, group: str, prior: bool) -> None:
    prompts = [prompt for prompt in load() if prompt.group == group][:10]
    result = model(
        [prompt.text for prompt in prompts],
        num_images_per_prompt=4,
        keep=1,
        prior=prior,
        seed=[prompt.seed for prompt in prompts],
        output_type="np",
    )
    pictures = (torch.as_tensor(result.images) * 255).round().to(torch.uint8).numpy()
    correct = [right(read(picture), prompt.claim) for picture, prompt in zip(pictures, prompts, strict=True)]
    assert sum(correct) >= 8  # untrained: 0


def test_it_says_what_it_knows(model: TextToImage) -> None:
    assert model.card.unknown_words("a photo of a dog") == ["photo", "dog"]
    assert not model.card.unknown_words("three small green stars on black")
    assert "shapes" in model.card.knows and model.card.more["training"]


def test_assets_hold_nothing_else() -> None:
    assets = Path(FOLDER).parent
    assert {path.name for path in assets.iterdir()} == {"configs", "shapes64"}
    assert {path.suffix for path in (assets / "configs").rglob("*") if path.is_file()} == {".json"}


def test_drafts_are_painted_by_a_network_of_their_own(model: TextToImage) -> None:
    drafter = model.model.drafter
    assert drafter is not None and drafter.num_inference_steps == 5
    found = model("a red circle", num_images_per_prompt=8, keep=1, seed=0, search="draft")
    painted = sum(each.painted for each in found.candidates)
    assert painted < 8 and found.account.evaluations["decoder"] == 8 * 5 + painted * 20 * 2
