"""What CLIP sees in pictures, painted by Kandinsky 2.2 and 2.1: variations, what lies between, text differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen import Request, TextToImage
from gen.command import main
from gen.embeds import moved, slerp
from gen.resolve import resolve
from tests.pictures import picture
from tests.stock import LATENTS, LONG, SEED, SHORT, apart
from tests.stock_kandinsky import SIZE
from tests.tiny import WIDTH
from tests.tiny_kandinsky import VERSIONS

ASKED: dict[str, Any] = {"seed": SEED, "num_inference_steps": 4, "output_type": "latent", "rerank": False}
PRIOR: dict[str, Any] = {"prior_num_inference_steps": 2}


def seen(model: TextToImage, *pictures: Any) -> Tensor:
    assert model.model.clip is not None
    with torch.no_grad():
        return model.model.clip.image(list(pictures))


@pytest.mark.parametrize("version", VERSIONS)
def test_pictures_become_the_embedding_that_is_told(kandinskys: dict[str, TextToImage], version: str) -> None:
    """As if it were handed in, with words, with a null of one's own, and from a picture to begin with as well."""
    model = kandinskys[version]
    a, b = picture(0), picture(1, (64, 64))
    z, other = seen(model, a, b)
    assert model.model.clip is not None
    with torch.no_grad():
        before, after = model.model.clip.text([LONG, SHORT]).embedding
    null = {"negative_image_embeds": torch.ones(1, WIDTH)}
    beginning = {"image": picture(2, (64, 64)), "strength": 0.5}
    cases: list[tuple[dict[str, Any], Tensor, dict[str, Any]]] = [
        ({}, z, {}),
        ({"interpolate_image": b, "interpolation": 0.2}, slerp(z, other, 0.2), {}),
        ({"edit_from": LONG, "edit_amount": 0.5}, moved(z, before, after, 0.5), {}),
        ({"edit_from": LONG, "interpolate_image": b}, moved(slerp(z, other, 0.5), before, after, 0.3), {}),
        ({}, z, null),
        ({"edit_from": LONG}, moved(z, before, after, 0.3), beginning),
    ]
    found = []
    for words, embeds, both in cases:
        beside = ASKED | SIZE | both
        found.append(model(SHORT, variation_of=a, **words, **beside).images)
        assert apart(found[-1], model(SHORT, image_embeds=embeds[None], **beside).images) <= LATENTS  # type: ignore[arg-type]
    for k, one in enumerate(found):  # and none is another
        assert all(apart(one, later) > 1e-3 for later in found[k + 1 :])
    alone = model(variation_of=a, **ASKED, **SIZE).images
    # 2.1's UNet is told the prompt, 2.2's is not
    assert (apart(alone, found[0]) > 1e-3) == (version == "2.1")


@pytest.mark.parametrize("version", VERSIONS)
def test_two_prompts_meet_through_the_prior(kandinskys: dict[str, TextToImage], version: str) -> None:
    model = kandinskys[version]
    asked = ASKED | SIZE | PRIOR
    ways = {
        share: model(SHORT, interpolate_prompt=LONG, interpolation=share, **asked).images for share in (0.0, 0.3, 1.0)
    }
    assert apart(ways[0.0], model(SHORT, **asked).images) <= LATENTS  # type: ignore[arg-type]
    assert apart(ways[1.0], model(LONG, **asked).images) <= LATENTS  # type: ignore[arg-type]
    assert min(apart(ways[0.3], ways[end]) for end in (0.0, 1.0)) > 1e-3  # type: ignore[arg-type]
    if version == "2.2":  # all that its UNet is told
        prior = model.model.prior
        assert prior is not None
        plain = resolve(Request(prompt=[SHORT, LONG], seed=SEED, **PRIOR), model.model.abilities).candidates
        first, last = prior.sample(plain).unbind(0)
        same = model(image_embeds=slerp(first, last, 0.3)[None], **ASKED, **SIZE).images
        assert apart(ways[0.3], same) <= LATENTS  # type: ignore[arg-type]


WAYS: list[dict[str, Any]] = [
    {"interpolate_prompt": LONG, "prior_best_of": 2, "negative_prompt": "blue", **PRIOR},
    {"variation_of": picture(), "interpolate_image": picture(1), "edit_from": LONG},
    {"variation_of": picture(), "image": picture(1, (64, 64)), "strength": 0.5},
    {"image": picture(1, (64, 64)), "strength": 0.5, "prior_best_of": 2, "interpolate_prompt": LONG, **PRIOR},
]


@pytest.mark.parametrize("way", WAYS, ids=["prompts", "pictures", "picture-from-picture", "prompts-from-picture"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_does_not_depend_on_its_batch_and_repeats(
    kandinskys: dict[str, TextToImage], version: str, way: dict[str, Any]
) -> None:
    model = kandinskys[version]
    asked = ASKED | ({} if "image" in way else SIZE) | {"output_type": "pt"} | way
    one = Request(prompt=SHORT, num_images_per_prompt=2, **asked)
    other = Request(prompt=LONG, variation_of=picture(1), **(ASKED | SIZE))
    together = model.paint([other, one], batch_size=3)[1]
    sources = [value for value in way.values() if not isinstance(value, str | int | float)]
    alone = model(SHORT, **(asked | {"seed": SEED + 1})).images
    assert (alone[0] - together.images[1]).abs().max() <= 1 / 255  # type: ignore[union-attr,operator]
    assert (model.repaint(json.loads(json.dumps(together.records[1])), sources) - alone[0]).abs().max() <= 1 / 255


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"variation_of": picture()}, "variation_of was given, but this model has no CLIP for it; leave it out"),
        ({"interpolate_prompt": LONG}, "this model has no prior and paints nothing from a text alone"),
        ({"prior_best_of": 2}, "this model has no prior and paints nothing from a text alone"),
        ({"image": picture(), "strength": 0.5}, "this model has no prior and paints nothing from a text alone"),
    ],
)
def test_a_decoder_alone_says_what_it_lacks(
    kandinsky_folders: dict[str, dict[str, Path]], asked: dict[str, Any], message: str
) -> None:
    abilities = TextToImage.from_pretrained(kandinsky_folders["2.2"]["decoder"], device="cpu").model.abilities
    with pytest.raises(ValueError, match=message) as caught:
        resolve(Request(prompt=SHORT, **asked), abilities)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"noise_level": 5}, "noise_level=5 is out of range; give a whole number from 0 to 0"),
        ({"clip_skip": 1}, "this model's decoder has no text tower of CLIP; leave it out"),
        ({"prompt_weights": True}, "this model reads a prompt only as it stands; leave prompt_weights out"),
        ({"long_prompts": True}, "this model reads a prompt only as it stands; leave long_prompts out"),
        ({"prompt_2": "a"}, "this model has no second text tower; leave it out"),
        ({"edit_from": LONG}, "edit_from was given without variation_of"),
        ({"variation_of": picture(), "prior": True}, "prior=True and variation_of were both given"),
        ({"variation_of": picture(), "image_embeds": torch.zeros(1, WIDTH)}, "variation_of and image_embeds were both"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(
    kandinskys: dict[str, TextToImage], asked: dict[str, Any], message: str
) -> None:
    for model in kandinskys.values():
        with pytest.raises(ValueError, match=message) as caught:
            resolve(Request(prompt=SHORT, **asked), model.model.abilities)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "--variation-of a --interpolate-image b --edit-from star --image b --strength 0.6",
        "--interpolate-prompt star --interpolation 0.3 --prior-best-of 2 --prior-steps 2 --height 64 --width 64",
    ],
    ids=["pictures", "prompts"],
)
def test_the_command_line_paints_and_repeats_them(
    kandinsky_folders: dict[str, dict[str, Path]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"a": tmp_path / "a.png", "b": tmp_path / "b.png"}
    for k, path in enumerate(paths.values()):
        picture(k, (64, 64)).save(path)
    typed = [str(paths.get(word, word)) for word in words.split()]
    argv = ["generate", LONG, "--model", str(kandinsky_folders["2.1"]["combined"]), "-n", "1", "--steps", "4", "--json"]
    assert main([*argv, "--out", str(tmp_path / "out"), *typed]) == 0
    path = json.loads(capsys.readouterr().out)["pictures"][0]["path"]
    assert main(["reproduce", path]) == 0
