"""A text's keys and values: those computed anew, projected once, kept as long as rows read the text."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen import Request, TextToImage
from gen.attention.network import attentions, restore_attention, set_attention
from gen.attention.texts import TextCache, Texts
from gen.candidate import Candidate
from gen.conditioning import Conditions, Distinct, Table
from gen.lane import Pass, Plan
from gen.row import Row
from tests.attention import UNETS, apart, drawn, inputs, painted, texts_of, unet_of
from tests.engines import rows_over
from tests.tiny import WIDTH

WORDS = ["a small red circle", "a large blue square above a star"]
ASKED = [
    Request(prompt=WORDS[0], seed=7, num_images_per_prompt=3, rerank=False, output_type="latent"),
    Request(prompt=WORDS[1], seed=1, prior=False, negative_prompt="a star", rerank=False, output_type="latent"),
    Request(prompt=WORDS[0], seed=2, guidance_scale=1.0, num_inference_steps=6, rerank=False, output_type="latent"),
    Request(
        image_embeds=drawn(1, WIDTH), seed=2, num_inference_steps=2, sampler="heun", rerank=False, output_type="latent"
    ),
]


def test_blocks_are_as_large_as_the_counts_allow() -> None:
    def blocks(of: list[int]) -> tuple[int, tuple[int, ...]]:
        texts = Texts.read(of, [])
        return texts.block, texts.of_block

    assert blocks([0, 0, 0, 1, 1, 1]) == (3, (0, 1))
    assert blocks([0, 0, 0, 0, 1, 1, 2, 2]) == (2, (0, 0, 1, 2))
    assert blocks([0, 0, 1]) == (1, (0, 0, 1))
    assert blocks([0, 0, 1, 1, 0, 0]) == (2, (0, 1, 0))
    assert blocks([0, 1, 0, 1]) == (1, (0, 1, 0, 1))  # equally many, but not side by side


@torch.no_grad()
@pytest.mark.parametrize("of", [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 0, 0, 1], [0] * 4, [0, 1, 2]], ids=str)
@pytest.mark.parametrize("kind", UNETS)
def test_keys_and_values_kept_are_those_computed_anew(kind: str, of: list[int]) -> None:
    """At equal and unequal numbers of rows, texts side by side and not; also when asked again."""
    unet, given, texts = unet_of(kind), inputs(kind, of), texts_of(of)
    theirs = painted(unet, given)
    set_attention(unet)
    for _ in range(2):
        assert apart(painted(unet, given, texts), theirs) < 1e-5
    if max(of) and kind != "attention without text":  # what is kept is indeed what is read
        swapped = Distinct(texts.unique[::-1], texts.of)
        assert apart(painted(unet, given, swapped), theirs) > 1e-3


def test_gradients_of_the_picture_do_not_need_the_text_again() -> None:
    """CLIP-gradient guidance differentiates the network by x, step after step, over the keys and values kept."""
    of = [0, 0, 1]
    unet, given, texts = unet_of("SD 1"), inputs("SD 1", of), texts_of(of)

    def gradient(read: Distinct[Tensor] | None) -> Tensor:
        x = given["sample"].clone().requires_grad_()
        painted(unet, given | {"sample": x}, read).square().sum().backward()
        assert x.grad is not None
        return x.grad

    theirs = gradient(None)
    set_attention(unet)
    for _ in range(2):
        assert apart(gradient(texts), theirs) < 1e-5


def test_pictures_are_the_stock_modules_whatever_is_beside_them(tiny: TextToImage, stock_tiny: TextToImage) -> None:
    """Unequal numbers of rows, joining and leaving, with an own image embedding, a negative prompt and no guidance."""
    for batch_size in (None, 2, 5):
        theirs = stock_tiny.paint(ASKED, batch_size=batch_size)
        for ours, other in zip(tiny.paint(ASKED, batch_size=batch_size), theirs, strict=True):
            assert apart(ours.images, other.images) < 1e-5


def rows_at(model: TextToImage, prompts: Sequence[str], **settings: Any) -> list[Row]:
    asked = replace(model.model.abilities.defaults, prior=False, **settings)
    candidates = [Candidate(prompt=prompt, seed=seed, settings=asked) for seed, prompt in enumerate(prompts)]
    pairs = model.model.encode_prompts(candidates, Table())
    schedule, shape = model.model.levels.schedule(asked.sampler, asked.num_inference_steps), (4, 8, 8)
    return [
        Row(seed, seed, shape, schedule, asked.sampler, prompt, null=null, guidance_scale=asked.guidance_scale)
        for seed, (prompt, null) in enumerate(pairs)
    ]


def cache_of(unet: nn.Module) -> TextCache:
    """What a network's processors keep, which is one object."""
    (cache,) = {layer.processor.text_cache for layer in attentions(unet)}
    return cache


def counted(unet: nn.Module) -> dict[str, int]:
    """How many texts each to_k and to_v of a layer that reads the text is asked to project, from now on."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            counts[name] = counts.get(name, 0) + len(given[0])

        return add

    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(hook(name))
    return counts


def test_every_text_is_projected_once_per_layer(own: TextToImage) -> None:
    """Over all steps, candidates and rows that come and go; candidates with image embeddings of their own too."""
    unet = own.model.unet
    set_attention(unet)
    layers = sum(layer.is_cross_attention for layer in attentions(unet))
    own.paint([ASKED[0]])  # a model's first call is measured, with texts of its own
    counts = counted(unet)
    own.paint([ASKED[0], ASKED[1]], batch_size=3)
    assert len(counts) == 2 * layers
    assert set(counts.values()) == {4}  # two prompts, the empty and the negative one
    restore_attention(unet)
    counts.clear()
    own.paint([ASKED[0]])
    steps = own.model.abilities.defaults.num_inference_steps
    assert set(counts.values()) == {steps * 2 * 3}


def test_the_empty_prompt_is_encoded_once_per_model(own: TextToImage) -> None:
    read: list[int] = []
    own.model.text.encoder.register_forward_hook(lambda module, given, out: read.append(len(out.last_hidden_state)))
    for _ in range(3):
        own(WORDS, prior=False, rerank=False, output_type="latent", seed=0)
    assert read == [1, 2, 2, 2]


def test_nothing_is_kept_after_the_rows(own: TextToImage) -> None:
    unet = own.model.unet
    set_attention(unet)
    rows = rows_over(own)
    with torch.no_grad():
        rows.admit(rows_at(own, WORDS * 2))
        rows.tick()
    cache = cache_of(unet)
    assert len(cache.pairs) == 3 and len(cache.calls) == 1
    key_value = weakref.ref(next(iter(cache.pairs.values()))[0])
    rows.drop({0, 2})
    with torch.no_grad():
        rows.tick()
    assert len(cache.pairs) == 2 and key_value() is not None  # the other prompt's, and the empty one's
    rows.drop({1, 3})
    assert key_value() is None and len(cache.pairs) == len(cache.calls) == 0


def test_tokens_that_the_caller_keeps_do_not_keep_keys_and_values(own: TextToImage) -> None:
    unet = own.model.unet
    set_attention(unet)
    embeds = drawn(1, *own.model.text.shape)
    asked: dict[str, Any] = {"prior": False, "rerank": False, "output_type": "latent", "seed": 0}
    own(prompt_embeds=embeds, **asked)
    gc.collect()
    assert len(cache_of(unet).pairs) == len(cache_of(unet).calls) == 0


def test_texts_side_by_side_are_read_in_one_block_each(own: TextToImage) -> None:
    """Candidates with image embeddings of their own have conditions of their own, and still share their text."""
    model, asked = own.model, own.model.abilities.defaults
    candidates = [Candidate(prompt=WORDS[k // 2], seed=k, settings=asked) for k in range(4)]
    pairs = model.encode_prompts(candidates, Table())
    prompts = model.add_image_embeds(candidates, [prompt for prompt, _ in pairs], drawn(4, WIDTH).unbind(0))
    schedule = model.levels.schedule(asked.sampler, asked.num_inference_steps)
    rows = rows_over(own)
    rows.admit(
        [
            Row(seed, seed, (4, 8, 8), schedule, asked.sampler, prompt, null=null, guidance_scale=3.0)
            for seed, (prompt, (_, null)) in enumerate(zip(prompts, pairs, strict=True))
        ]
    )
    (lane,) = rows.lanes.values()
    conditions = Pass.of([lane], [Plan.of(lane, rows.device)], rows.device).conditions
    texts = Texts.read(Conditions(tuple(conditions)).distinct_encoder_hidden_states.of, [])
    assert len(set(conditions)) == 5 and (texts.block, texts.of_block) == (2, (0, 0, 1, 2))
