"""Texts of requests in flight are read together, so many at once, and what is the same is read once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gen import Request, TextToImage
from gen.conditioning import MOST_TEXTS
from tests.engines import run
from tests.gen.engine.asked import PLAIN, decoder_rows, engine_of
from tests.pictures import LEVEL


@contextmanager
def texts_read(model: TextToImage) -> Iterator[list[int]]:
    """How many texts each call of a text tower reads: the decoder's, the prior's and CLIP's."""
    towers = [model.model.text.encoder, model.model.prior.text_encoder, model.model.clip.model]
    embeddings = {
        module for tower in towers for name, module in tower.named_modules() if name.endswith("token_embedding")
    }
    read: list[int] = []
    hooks = [each.register_forward_hook(lambda module, given, out: read.append(len(out))) for each in embeddings]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def test_requests_that_say_the_same_are_told_the_same(tiny: TextToImage) -> None:
    """Two requests in flight with one prompt and one null: one text each, encoded once."""
    engine = engine_of(tiny)
    for seed in (1, 2):
        engine.submit(replace(PLAIN, prompt="a green star", seed=seed, prior=False, num_images_per_prompt=2))
    with texts_read(tiny) as read:
        engine.tick()
    assert 1 <= sum(read) <= 2  # the prompt, and the empty one where this model has not read it before
    conditions = {condition for one in decoder_rows(engine) for condition in (one.row.prompt, one.row.null)}
    assert len(decoder_rows(engine)) == 4 and len(conditions) == 2
    run(engine)


def test_texts_of_requests_that_come_together_are_read_together(tiny: TextToImage) -> None:
    """For the decoder once, which CLIP ranks by too, and for the prior once."""
    tiny("a star", seed=1, prior=True)  # so that the empty prompt is known
    engine = tiny.engine()
    asked = [Request(prompt=f"a star number {seed}", seed=seed, output_type="pt", prior=True) for seed in range(3)]
    futures = [engine.submit(request) for request in asked]
    with texts_read(tiny) as read:
        run(engine)
    assert read == [3, 3]
    for future, request in zip(futures, asked, strict=True):
        assert (future.result(timeout=0).images - tiny.paint([request])[0].images).abs().max() <= LEVEL


def test_a_text_tower_is_asked_for_a_bounded_number_of_texts(tiny: TextToImage) -> None:
    """By the decoder and by the prior, of a request with many prompts."""
    prompts = [f"a star number {k}" for k in range(MOST_TEXTS + 3)]
    short = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "prior": True, "output_type": "pt"}
    with texts_read(tiny) as read:
        (many,) = tiny.paint([Request(prompt=prompts, seed=1, **short)])
    assert sum(read) >= 2 * len(prompts) and max(read) == MOST_TEXTS
    (last,) = tiny.paint([Request(prompt=prompts[-1], seed=1, **short)])
    assert (many.images[-1] - last.images[0]).abs().max() <= LEVEL


def ranked(model: TextToImage, prompt: str, **words: Any) -> tuple[list[int], Tensor, Tensor]:
    """How many texts each call has read for two pictures, their scores, and what CLIP says of them by itself."""
    words = {"seed": 5, "num_images_per_prompt": 2, "prior": False, "output_type": "pt"} | words
    model("a star", seed=1, prior=False, rerank=False)  # so that the empty prompt is known
    with texts_read(model) as read:
        result = model(prompt, **words)
    seen = (result.images * 255).round() / 255
    return read, torch.tensor(result.scores), model.model.clip.score(seen, "a red star")


@pytest.mark.parametrize("words", [{}, {"clip_skip": 1}, {"guidance_scale": 1.0}])
def test_clip_reads_no_text_that_its_tower_has_read_for_the_decoder(tiny: TextToImage, words: dict[str, Any]) -> None:
    """And scores to the same bits as if it had."""
    read, scores, by_clip = ranked(tiny, "a red star", **words)
    assert read == [1] and scores.equal(by_clip)


def test_a_request_in_flight_that_says_the_same_is_ranked_by_the_same_reading(tiny: TextToImage) -> None:
    tiny("a star", seed=1, prior=False, rerank=False)  # so that the empty prompt is known
    engine = tiny.engine()
    asked = Request(prompt="a red star", prior=False, output_type="pt", num_images_per_prompt=2)
    futures = [engine.submit(replace(asked, seed=1))]
    with texts_read(tiny) as read:
        engine.tick()
        futures.append(engine.submit(replace(asked, seed=2)))
        run(engine)
    assert read == [1] and all(future.result(timeout=0).scores for future in futures)


@pytest.mark.parametrize(
    ("prompt", "words", "texts"),
    [
        ("a (red:1.5) star", {"prompt_weights": True}, [1]),
        ("a re(d:1.5) star", {"prompt_weights": True}, [1, 1]),  # other ids: the decoder reads "re" and "d"
        ("a red star", {"long_prompts": True, "negative_prompt": "a blue circle " * 15}, [2, 2]),
        ("a red star", {"interpolate_prompt": "a blue circle", "interpolation": 0.0}, [1, 1, 1]),  # the other one
    ],
)
def test_clip_scores_by_the_text_itself_however_the_decoder_is_told_it(
    tiny: TextToImage, prompt: str, words: dict[str, Any], texts: list[int]
) -> None:
    """With weights, in pieces, or between two texts."""
    read, scores, by_clip = ranked(tiny, prompt, **words)
    assert read == texts
    assert (scores - by_clip).abs().max() < 1e-6


def test_clip_reads_by_itself_where_the_decoder_has_a_tower_of_its_own(own: TextToImage) -> None:
    own.model = own.model.with_own_texts()
    with torch.no_grad():
        own.model.text.encoder.final_layer_norm.bias += 1
    read, scores, by_clip = ranked(own, "a red star")
    assert read == [1, 1] and scores.equal(by_clip)


def test_clip_reads_whole_what_the_decoders_tokenizer_cuts(own: TextToImage) -> None:
    own.model.text.tokenizer.model_max_length = 4
    read, scores, by_clip = ranked(own, "a red star")
    assert read == [1, 1] and scores.equal(by_clip)
