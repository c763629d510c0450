"""Pictures by their CLIP embedding: variations, what lies between two, text differences, a prior's best answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from clip_core.score import cosine
from gen import Request, TextToImage
from gen.embeds import PRIOR_SEED_STRIDE, moved, slerp
from gen.resolve import resolve
from samplers.noise import noise
from tests.pictures import picture
from tests.stock import LATENTS, LONG, SHORT, apart
from tests.stock_unclip import img2img, with_our_noise
from tests.tiny import WIDTH, make_tiny_clip
from tests.tiny_karlo import make_tiny_karlo

SEED = 11
ASKED: dict[str, Any] = {"seed": SEED, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def seeing(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stock's Img2Img class: an image tower of its own and no prior."""
    whole = img2img(tiny_folder)
    parts = {
        name: part for name, part in whole.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    folder = tmp_path_factory.mktemp("seeing") / "model"
    StableUnCLIPImg2ImgPipeline(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(tiny_folder / "clip").eval(),
        feature_extractor=CLIPImageProcessor.from_pretrained(tiny_folder / "clip"),
        **parts,
    ).save_pretrained(folder)
    return folder


def seen(model: TextToImage, one: Any) -> Tensor:
    assert model.model.clip is not None
    with torch.no_grad():
        return model.model.clip.image([one])


def texts(model: TextToImage, *prompts: str) -> Tensor:
    assert model.model.clip is not None
    with torch.no_grad():
        return model.model.clip.text(list(prompts)).embedding


# --- the arithmetic ----------------------------------------------------------------------------------------------


def test_slerp_goes_along_the_sphere() -> None:
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle, length = share * math.pi / 2, 2 + 2 * share
        exact = torch.tensor([math.cos(angle), math.sin(angle), 0.0]) * length
        assert torch.allclose(slerp(a, b, share), exact, atol=1e-6)
    assert torch.allclose(slerp(a, a, 0.3), a) and torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.equal(slerp(torch.zeros(3), torch.zeros(3), 0.5), torch.zeros(3))
    many = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.allclose(slerp(many[0], many[1], 0.3)[2], slerp(many[0][2], many[1][2], 0.3))


def test_a_text_difference_turns_by_its_share_of_the_angle() -> None:
    image, before, after = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    direction = F.normalize(F.normalize(after, dim=0) - F.normalize(before, dim=0), dim=0)
    whole = torch.acos(F.normalize(image, dim=0) @ direction)
    turned = moved(image, before, after, 0.25)
    assert turned.norm().item() == pytest.approx(image.norm().item(), rel=1e-5)
    angle = torch.acos(F.normalize(image, dim=0) @ F.normalize(turned, dim=0))
    assert angle.item() == pytest.approx(0.25 * whole.item(), rel=1e-3)
    assert torch.allclose(moved(image, before, after, 0.0), image, atol=1e-6)


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0, 200])
def test_a_variation_equals_stocks(seeing: Path, noise_level: int) -> None:
    model = TextToImage.from_pretrained(seeing, device="cpu")
    pipeline = with_our_noise(StableUnCLIPImg2ImgPipeline.from_pretrained(seeing), [SEED])
    start = noise([SEED], "decoder", 0, (4, 8, 8))
    asked = {name: value for name, value in ASKED.items() if name != "seed"} | {"noise_level": noise_level}
    # of the size that the tower takes, and of another, which transformers rounds in another way than Pillow
    for image, distance in ((picture(size=(64, 64)), LATENTS), (picture(), 1e-3)):
        theirs = pipeline(image, prompt=SHORT, latents=start, **asked).images
        assert apart(model(SHORT, variation_of=image, **ASKED, noise_level=noise_level).images, theirs) <= distance
        theirs = pipeline(image, latents=start, **asked).images  # without a prompt
        assert apart(model(variation_of=image, **ASKED, noise_level=noise_level).images, theirs) <= distance
    with pytest.raises(ValueError, match="edit_from compares texts by the CLIP"):
        model(SHORT, variation_of=image, edit_from=LONG, **ASKED)


def test_a_seeing_folder_is_saved_as_it_was(seeing: Path, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(seeing, device="cpu")
    folder = model.save(tmp_path / "saved")
    assert (folder / "model_index.json").read_text() == (seeing / "model_index.json").read_text()
    again = TextToImage.from_pretrained(folder, device="cpu")
    asked = ASKED | {"variation_of": picture()}
    assert torch.equal(again(SHORT, **asked).images, model(SHORT, **asked).images)


def test_with_a_prior_beside_it_a_seeing_folder_takes_texts_too(seeing: Path, tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(seeing, device="cpu", prior_model=make_tiny_karlo(tmp_path / "karlo"))
    again = TextToImage.from_pretrained(model.save(tmp_path / "saved"), device="cpu")
    alone = TextToImage.from_pretrained(seeing, device="cpu")
    words = ASKED | {"variation_of": picture()}
    assert torch.equal(model(SHORT, **words).images, alone(SHORT, **words).images)
    for asked in (words, ASKED | {"prior_num_inference_steps": 3}):
        assert torch.equal(again(SHORT, **asked).images, model(SHORT, **asked).images)
    assert again.model.saved_as == "StableUnCLIPPipeline" and again.model.prior is not None


def test_pictures_become_the_embedding_that_is_told(tiny: TextToImage) -> None:
    """A variation, what lies between two pictures, and a text difference: as if the embedding were handed in."""
    a, b = picture(0), picture(1, (64, 64))
    z, other = seen(tiny, a), seen(tiny, b)
    before, after = texts(tiny, LONG, SHORT)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, z),
        ({"interpolate_image": b}, slerp(z, other, 0.5)),
        ({"interpolate_image": b, "interpolation": 0.2}, slerp(z, other, 0.2)),
        ({"edit_from": LONG}, moved(z[0], before, after, 0.3)[None]),
        ({"edit_from": LONG, "edit_amount": 0.5}, moved(z[0], before, after, 0.5)[None]),
    ]
    found = []
    for words, embeds in cases:
        found.append(tiny(SHORT, variation_of=a, **words, **ASKED).images)
        assert torch.allclose(found[-1], tiny(SHORT, image_embeds=embeds, **ASKED).images, atol=1e-4)
    for k, one in enumerate(found):  # and none is another
        assert all(apart(one, later) > 1e-3 for later in found[k + 1 :])


def test_two_prompts_meet_through_the_prior(tiny: TextToImage) -> None:
    prior = tiny.model.prior
    assert prior is not None
    plain = resolve(Request(prompt=[SHORT, LONG], seed=SEED), tiny.model.abilities).candidates
    first, last = prior.sample(plain).unbind(0)
    with torch.no_grad():
        tokens = tiny.model.text([SHORT, LONG]).tokens
        null = tiny.model.text([""]).tokens
    ways = {}
    for share in (0.0, 0.3, 1.0):
        way = tiny(SHORT, interpolate_prompt=LONG, interpolation=share, **ASKED).images
        embeds = {"prompt_embeds": slerp(tokens[0], tokens[1], share)[None], "negative_prompt_embeds": null}
        same = tiny(image_embeds=slerp(first, last, share)[None], **embeds, **ASKED).images
        assert torch.allclose(way, same, atol=1e-4)
        ways[share] = way
    assert torch.allclose(ways[0.0], tiny(SHORT, **ASKED).images, atol=1e-4)
    assert torch.allclose(ways[1.0], tiny(LONG, **ASKED).images, atol=1e-4)
    assert apart(ways[0.3], ways[0.0]) > 1e-3


def test_between_two_prompts_the_ranking_is_between_them_too(tiny: TextToImage) -> None:
    result = tiny(SHORT, interpolate_prompt=LONG, interpolation=0.3, **(ASKED | {"output_type": "pt"}))
    assert result.scores is not None and tiny.model.clip is not None
    with torch.no_grad():
        embedding = tiny.model.clip.image(result.images)  # type: ignore[arg-type]
    text = slerp(*texts(tiny, SHORT, LONG), 0.3)
    assert result.scores[0] == pytest.approx(cosine(embedding, text).item(), abs=1e-5)


def test_the_best_of_the_priors_answers_is_taken(tiny: TextToImage) -> None:
    prior = tiny.model.prior
    assert prior is not None
    taken = set()
    for seed in range(6):
        seeds = [(seed + k * PRIOR_SEED_STRIDE) % 2**32 for k in range(3)]
        answers = prior.sample(resolve(Request(prompt=[SHORT] * 3, seed=seeds), tiny.model.abilities).candidates)
        with torch.no_grad():
            text = prior.conditions([SHORT])[0].pooled_projections
        assert text is not None
        best = int(cosine(answers, text).argmax())
        taken.add(best)
        asked = ASKED | {"seed": seed}
        ours = tiny(SHORT, prior_best_of=3, **asked)
        assert torch.allclose(ours.images, tiny(SHORT, image_embeds=answers[best][None], **asked).images, atol=1e-4)
        assert ours.account.evaluations["prior"] == 3 * tiny(SHORT, **asked).account.evaluations["prior"]
    assert len(taken) > 1
    assert torch.equal(tiny(SHORT, prior_best_of=1, **ASKED).images, tiny(SHORT, **ASKED).images)


WAYS: list[dict[str, Any]] = [
    {"prior_best_of": 2},
    {"interpolate_prompt": LONG, "prior_best_of": 2},
    {"variation_of": picture(), "interpolate_image": picture(1), "noise_level": 100},
    {"variation_of": picture(), "edit_from": LONG},
]


@pytest.mark.parametrize("way", WAYS, ids=["best", "prompts", "pictures", "difference"])
def test_a_picture_does_not_depend_on_its_batch_and_repeats(tiny: TextToImage, way: dict[str, Any]) -> None:
    asked = {"num_inference_steps": 4, "output_type": "pt", "seed": 5, **way}
    one = Request(prompt=SHORT, num_images_per_prompt=3, **asked)
    others = [
        Request(prompt=LONG, seed=9, output_type="pt"),
        Request(prompt=LONG, image=picture(size=(64, 64)), seed=2),
    ]
    together = tiny.paint([others[0], one, others[1]], batch_size=4)[1]
    assert together.scores is not None
    sources = [value for value in way.values() if not isinstance(value, str | int)]
    for k, seed in enumerate(together.seeds):
        alone = tiny(SHORT, **(asked | {"seed": seed})).images
        assert (together.images[k] - alone[0]).abs().max() <= 1 / 255  # type: ignore[operator, union-attr]
        assert (tiny.repaint(together.records[k], sources) - alone[0]).abs().max() <= 1 / 255


def test_a_record_asks_for_the_clip_that_made_its_embedding(tiny_folder: Path, tmp_path: Path) -> None:
    for seed, name in ((3, "a"), (4, "b"), (3, "moved")):
        make_tiny_clip(tmp_path / name, seed=seed)
    one, other, moved_one = (
        TextToImage.from_pretrained(tiny_folder, clip=tmp_path / name) for name in ("a", "b", "moved")
    )
    own = TextToImage.from_pretrained(tiny_folder)
    result = one(SHORT, variation_of=picture(), num_inference_steps=2, seed=0, output_type="pt")
    (record,) = result.records
    assert record["clip"] == str(tmp_path / "a") and record["clip_hash"] == one.clip_hash == moved_one.clip_hash
    assert len(one.clip_hash) == 64 and one.hash == own.hash and own.clip_hash == ""
    for same in (one, moved_one):
        assert torch.equal(same.repaint(record, [picture()]), result.images[0])
    with pytest.raises(ValueError, match=r"painted by CLIP '.*a' of hash \w{12}, and this is '.*b' of hash \w{12};"):
        other.repaint(record, [picture()])
    with pytest.raises(ValueError, match=r"painted by CLIP '.*a' of hash \w{12}, and this is the model's own; load"):
        own.repaint(record, [picture()])
    (by_own,) = own(SHORT, variation_of=picture(), num_inference_steps=2, seed=0).records
    assert "clip" not in by_own and "clip_hash" not in by_own
    with pytest.raises(ValueError, match=r"painted by the model's own CLIP, and this is '.*a' of hash"):
        one.repaint(by_own, [picture()])
    with pytest.raises(ValueError, match=r"names CLIP '.*a' and has no clip_hash"):
        one.repaint({name: value for name, value in record.items() if name != "clip_hash"}, [picture()])
    moved = result.records[0] | {"settings": result.records[0]["settings"] | {"edit_from": LONG}}  # type: ignore[operator]
    del moved["variation_of"]
    with pytest.raises(ValueError, match="moves the embedding of a picture that it does not name"):
        one.repaint(moved)


@pytest.mark.parametrize("search", ["halving", "draft", "feynman_kac", "zero_order"])
def test_searches_wait_for_all_answers_of_the_prior(tiny: TextToImage, search: str) -> None:
    asked: dict[str, Any] = {"sampler": "ddpm", "num_inference_steps": 8, "prior_best_of": 2, "output_type": "pt"}
    result = tiny(SHORT, num_images_per_prompt=6, keep=2, search=search, seed=1, **asked)
    for image, record in zip(result.images, result.records, strict=True):
        assert (tiny.repaint(record) - image).abs().max() <= 1 / 255


def test_a_callback_hears_of_candidates_and_not_of_answers(tiny: TextToImage) -> None:
    heard: list[int] = []
    tiny(SHORT, prior_best_of=2, callback=lambda step: heard.extend(step.seeds), **ASKED)
    assert set(heard) == {SEED}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"interpolate_image": picture()}, "interpolate_image was given without variation_of; give the picture"),
        ({"edit_from": LONG}, "edit_from was given without variation_of"),
        ({"variation_of": picture(), "edit_from": LONG, "prompt": None}, "edit_from was given without prompt"),
        (
            {"interpolate_prompt": LONG, "prompt": None, "variation_of": picture()},
            "interpolate_prompt was given without",
        ),
        ({"interpolate_prompt": LONG, "variation_of": picture()}, "interpolate_prompt goes from the prompt in words"),
        ({"interpolate_prompt": 3}, "interpolate_prompt is 3; give a text"),
        ({"interpolation": 0.5}, "interpolation was given without interpolate_prompt or interpolate_image"),
        (
            {"interpolate_prompt": LONG, "interpolation": 2},
            "interpolation=2 is out of range; give a number",
        ),
        ({"edit_amount": 0.5}, "edit_amount was given without edit_from; say what the picture shows"),
        ({"variation_of": picture(), "edit_from": " "}, "edit_from is empty"),
        ({"interpolate_prompt": ""}, "interpolate_prompt is empty"),
        ({"variation_of": [], "prompt": None}, "variation_of is empty; give at least one picture"),
        ({"variation_of": "nowhere.png"}, "picture nowhere.png does not exist"),
        ({"variation_of": picture(), "prior": True}, "prior=True and variation_of were both given"),
        ({"variation_of": picture(), "image_embeds": torch.zeros(1, WIDTH)}, "variation_of and image_embeds were both"),
        ({"prior_best_of": 0}, "prior_best_of=0 is out of range; give a whole number from 1 to 64"),
        ({"prior_best_of": 2, "prior_latents": torch.zeros(1, WIDTH)}, "prior_latents are the start of one answer"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(tiny: TextToImage, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(Request(**({"prompt": SHORT} | asked)), tiny.model.abilities)
    assert "\n" not in str(caught.value)
