"""Words that count more than others, and prompts longer than a text tower reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from clip_core.score import cosine
from gen import Request, TextToImage
from gen.prompts import parse, plain
from gen.resolve import resolve
from tests.stock import LATENTS, LONG, SEED, SHORT, apart, start, stock_of
from tests.tiny import LENGTH, make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl

ASKED: dict[str, Any] = {"seed": SEED, "num_inference_steps": 4, "output_type": "latent"}
ROOM = LENGTH - 2  # tokens beside both ends
ENDLESS = " ".join([LONG] * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp("prompts") / "1")


@pytest.fixture(scope="module")
def model(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


# --- the grammar -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red star", [("a red star", 1.0)]),
        ("a (red:1.3) star", [("a ", 1.0), ("red", 1.3), (" star", 1.0)]),
        ("a (red) [star]", [("a ", 1.0), ("red", 1.1), (" ", 1.0), ("star", 1 / 1.1)]),
        ("((red:2) star:.5)", [("red", 1.0), (" star", 0.5)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        (r"a \(red\) \[star\] \\", [(r"a (red) [star] \ "[:-1], 1.0)]),
        ("at 12:30 (noon: 1.5 )", [("at 12:30 ", 1.0), ("noon", 1.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(red:13e-1)", [("red", 1.3)]),
        ("(a ratio 3:4)", [("a ratio 3", 4.0)]),
        ("(a ratio 3:4:1.2)", [("a ratio 3:4", 1.2)]),
        (r"\(a ratio 3:4, or 5\) 1:2 [16:9 or so]", [("(a ratio 3:4, or 5) 1:2 ", 1.0), ("16:9 or so", 1 / 1.1)]),
        (r"back\slash", [(r"back\slash", 1.0)]),
        ("(red:0)", [("red", 0.0)]),
        ("", []),
    ],
)
def test_the_grammar(text: str, parts: list[tuple[str, float]]) -> None:
    found = parse("prompt", text)
    assert [part.text for part in found] == [piece for piece, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])
    assert plain(text) == "".join(piece for piece, _ in parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (red star", r"prompt 'a \(red star' has '\(' that is not closed"),
        ("a red) star", r"has a closing bracket that none opens; write \\\) or \\\] for itself"),
        ("a (red] star", "has a closing bracket that none opens"),
        ("a [red:1.5) star", "has a closing bracket that none opens"),
        ("a (red:11) star", "gives 'red' the weight 11; give 0 to 10"),
        ("a (red:-1) star", "gives the weight -1; give 0 to 10"),
        ("a ((red:-1):-2) star", "gives the weight -1; give 0 to 10"),
        ("a (red:1,3) star", r"has '1,3', which is no weight; write it as in \(word:1.3\), or \\\( and \\\) for"),
        ("a (red: +-1 ) star", r"has '\+-1', which is no weight"),
        ("a (red:1.3.5) star", "has '1.3.5', which is no weight"),
        ("a (red:30%) star", "has '30%', which is no weight"),
        ("a (red:1e9) star", r"gives 'red' the weight 1e\+09; give 0 to 10"),
        ("a [red:0.5] star", r"has a number in square brackets; write it as in \(word:1.3\), or \\\[ and \\\] for"),
        ("a (red:0.5] star", "has a closing bracket that none opens"),
        ("()", r"prompt '\(\)' has brackets and no words"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(model: TextToImage, text: str, message: str) -> None:
    for asked in ({"prompt": text}, {"prompt": SHORT, "negative_prompt": text}):
        with pytest.raises(ValueError, match=message) as caught:
            resolve(Request(**asked, prompt_weights=True), model.model.abilities)
        assert "\n" not in str(caught.value)
    resolve(Request(prompt=text), model.model.abilities)  # brackets are words where nobody asked for weights


# --- what the UNet is told ---------------------------------------------------------------------------------------


def states(model: TextToImage, *ids: list[int]) -> Tensor:
    """The text tower's own answer to ids between both ends: (1, L, D) of each, one behind the other."""
    text = model.model.text  # type: ignore[attr-defined]
    rows = []
    for inner in ids:
        row = [text.tokenizer.bos_token_id, *inner, text.tokenizer.eos_token_id]
        rows.append(row + [text.tokenizer.pad_token_id] * (LENGTH - len(row)))
    with torch.no_grad():
        return torch.cat(text.encoder(torch.tensor(rows)).last_hidden_state.unbind(0))[None]


def ids(model: TextToImage, text: str) -> list[int]:
    found: list[int] = model.model.text.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[attr-defined]
    return found


def test_a_weight_moves_a_words_states_from_the_empty_prompts(model: TextToImage, folder: Path) -> None:
    first, word, last = ids(model, "a"), ids(model, "red"), ids(model, "star")
    plain_states, empty = states(model, first + word + last), states(model, [])
    place = slice(1 + len(first), 1 + len(first) + len(word))
    pictures = []
    for weight in (0.0, 1.0, 1.3):
        handed = plain_states.clone()
        handed[:, place] = empty[:, place] + weight * (plain_states - empty)[:, place]
        ours = model(f"a (red:{weight}) star", prompt_weights=True, **ASKED).images
        stock = {"num_inference_steps": 4, "output_type": "latent", "latents": start(1, 1)}
        theirs = stock_of(StableDiffusionPipeline, folder)(
            prompt_embeds=handed, negative_prompt_embeds=empty, **stock
        ).images
        assert apart(ours, theirs) <= LATENTS
        pictures.append(ours)
    assert torch.equal(pictures[1], model("a red star", **ASKED).images)
    assert min(apart(pictures[0], pictures[1]), apart(pictures[2], pictures[1])) > 1e-3
    negative = model("a red star", negative_prompt="(blue:1.5)", prompt_weights=True, **ASKED).images
    assert apart(negative, model("a red star", negative_prompt="blue", **ASKED).images) > 1e-4
    escaped = model(r"a \(red\) star", prompt_weights=True, **ASKED).images
    assert torch.equal(escaped, model("a (red) star", **ASKED).images)


def test_a_long_prompt_is_read_in_pieces(model: TextToImage, folder: Path) -> None:
    every = ids(model, ENDLESS)
    number = -(-len(every) // ROOM)
    assert number >= 3
    handed = states(model, *(every[k * ROOM : (k + 1) * ROOM] for k in range(number)))
    null = states(model, ids(model, "blue"), *([[]] * (number - 1)))
    stock = {"num_inference_steps": 4, "output_type": "latent", "latents": start(1, 1)}
    theirs = stock_of(StableDiffusionPipeline, folder)(
        prompt_embeds=handed, negative_prompt_embeds=null, **stock
    ).images
    ours = model(ENDLESS, negative_prompt="blue", long_prompts=True, **ASKED).images
    assert apart(ours, theirs) <= LATENTS
    assert apart(model(ENDLESS, negative_prompt="blue", **ASKED).images, theirs) > 1e-3  # cut
    # the other way round too, and what is short stays as it was
    turned = model("blue", negative_prompt=ENDLESS, long_prompts=True, **ASKED).images
    assert apart(turned, model("blue", negative_prompt=ENDLESS, **ASKED).images) > 1e-3
    assert torch.equal(model(SHORT, long_prompts=True, **ASKED).images, model(SHORT, **ASKED).images)


def test_a_weighted_text_that_is_cut_is_told_of(model: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model(f"(star:1.2) {ENDLESS}", prompt_weights=True, **ASKED)
    assert "is cut to 1" in caplog.text


def test_two_towers_read_in_pieces_too(tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(make_tiny_stable_diffusion_xl(tmp_path / "xl"), device="cpu")
    whole = model(f"a (red:1.4) star {ENDLESS}", prompt_weights=True, long_prompts=True, **ASKED).images
    cut = model(f"a (red:1.4) star {ENDLESS}", prompt_weights=True, **ASKED).images
    for words in ("prompt_weights", "long_prompts"):
        with pytest.raises(ValueError, match=f"prompt_2 and {words}=True were both given; leave one of them out"):
            model(SHORT, prompt_2=LONG, **{words: True})
    plainly = model(f"a red star {ENDLESS}", long_prompts=True, **ASKED).images
    assert min(apart(whole, cut), apart(whole, plainly)) > 1e-4


def test_clip_and_the_prior_read_the_words_alone(tiny: TextToImage) -> None:
    asked = ASKED | {"output_type": "pt", "prompt_weights": True}
    result = tiny("a (red:1.4) star", **asked)
    assert result.scores is not None and tiny.model.clip is not None
    with torch.no_grad():
        text = tiny.model.clip.text(["a red star"]).embedding
        image = tiny.model.clip.image(result.images)  # type: ignore[arg-type]
    assert result.scores[0] == pytest.approx(cosine(image, text).item(), abs=1e-5)
    unweighted = tiny("a (red:1.0) star", **asked).images
    assert torch.equal(unweighted, tiny("a red star", **(ASKED | {"output_type": "pt"})).images)  # and so did the prior


def test_a_picture_does_not_depend_on_its_batch_and_repeats(tiny: TextToImage) -> None:
    words: dict[str, Any] = {"prompt_weights": True, "long_prompts": True, "output_type": "pt", "seed": 3}
    one = Request(prompt=f"a (red:1.4) star {ENDLESS}", num_images_per_prompt=2, **words)
    others = [Request(prompt=SHORT, seed=9), Request(prompt="a (blue:0.5) star", **words)]
    together = tiny.paint([others[0], one, others[1]])[1]
    for k, seed in enumerate(together.seeds):
        alone = tiny(one.prompt, **(words | {"seed": seed})).images
        assert (together.images[k] - alone[0]).abs().max() <= 1 / 255  # type: ignore[operator, union-attr]
        assert (tiny.repaint(together.records[k]) - alone[0]).abs().max() <= 1 / 255


def test_what_does_not_go_together_is_refused(model: TextToImage, tiny: TextToImage) -> None:
    embeds = torch.zeros(1, LENGTH, 16)
    for asked, message in (
        ({"long_prompts": True, "prompt_embeds": embeds}, "long_prompts=True and prompt_embeds were both given"),
        ({"long_prompts": True, "interpolate_prompt": LONG}, "long_prompts=True and interpolate_prompt were both"),
        ({"prompt_weights": 1}, "prompt_weights=1; give True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(Request(**({"prompt": SHORT} | asked)), model.model.abilities)  # type: ignore[arg-type]
