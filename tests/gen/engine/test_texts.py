"""Texts of requests in flight are read together, so many at once, and what is the same is read once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
    """For the decoder once, for the prior once, and by CLIP once their pictures are there."""
    tiny("a star", seed=1, prior=True)  # so that the empty prompt is known
    engine = tiny.engine()
    asked = [Request(prompt=f"a star number {seed}", seed=seed, output_type="pt", prior=True) for seed in range(3)]
    futures = [engine.submit(request) for request in asked]
    with texts_read(tiny) as read:
        run(engine)
    assert read == [3, 3, 3]
    for future, request in zip(futures, asked, strict=True):
        assert (future.result(timeout=0).images - tiny.paint([request])[0].images).abs().max() <= LEVEL


def test_a_text_tower_is_asked_for_a_bounded_number_of_texts(tiny: TextToImage) -> None:
    """By the decoder, by the prior and by CLIP, of a request with many prompts."""
    prompts = [f"a star number {k}" for k in range(MOST_TEXTS + 3)]
    short = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "prior": True, "output_type": "pt"}
    with texts_read(tiny) as read:
        (many,) = tiny.paint([Request(prompt=prompts, seed=1, **short)])
    assert sum(read) >= 3 * len(prompts) and max(read) == MOST_TEXTS
    (last,) = tiny.paint([Request(prompt=prompts[-1], seed=1, **short)])
    assert (many.images[-1] - last.images[0]).abs().max() <= LEVEL
