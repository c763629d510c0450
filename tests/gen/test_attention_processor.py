"""Ours in the place of diffusers' attention processors: the same answers, in a layer and in a whole UNet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor
from torch import Tensor

from gen.attention.network import reading, restore_attention, set_attention
from gen.conditioning import Alike, Distinct
from tests.attention import (
    ADDED,
    CHANNELS,
    COMMON,
    HEADS,
    LAYERS,
    LENGTH,
    ON_CPU,
    ROWS,
    SIDE,
    UNETS,
    apart,
    arguments,
    drawn,
    inputs,
    layer_of,
    painted,
    randomised,
    texts_of,
    unet_of,
)


def masks(kind: str) -> Iterator[Tensor | None]:
    """None, then a bias for each row's keys and one for each head's queries and keys, where stock takes them."""
    yield None
    reads_text = "encoder_hidden_states" in arguments(kind)
    keys = LENGTH if reads_text else SIDE * SIDE
    if kind == "added alone":  # stock pads the mask to more keys than there are
        return
    yield 4 * drawn(ROWS, 1, keys, seed=3)
    if not kind.startswith("added"):
        yield 4 * drawn(ROWS * HEADS, SIDE * SIDE, keys, seed=4)


@torch.no_grad()
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_equals_diffusers(kind: str, name: str) -> None:
    layer, given = layer_of(kind), arguments(kind)
    plain = layer(**given)
    for mask in masks(kind):
        theirs = layer(**given, attention_mask=mask)
        set_attention(layer, name)
        ours = layer(**given, attention_mask=mask)
        assert ours.shape == theirs.shape and apart(ours, theirs) < 1e-5
        assert mask is None or apart(ours, plain) > 1e-3
        restore_attention(layer)


@torch.no_grad()
def test_upcast_flags_equal_diffusers_processor_that_reads_them() -> None:
    layer, given = layer_of("upcast"), arguments("upcast")
    layer.set_processor(AttnProcessor())
    theirs = layer(**given)
    set_attention(layer)
    assert apart(layer(**given), theirs) < 1e-5


@torch.no_grad()
def test_added_keys_without_a_text_are_diffusers() -> None:
    layer = randomised(
        Attention(
            CHANNELS,
            heads=HEADS,
            dim_head=CHANNELS // HEADS,
            processor=AttnAddedKVProcessor2_0(),
            **(ADDED | {"added_kv_proj_dim": CHANNELS}),
        )
    )
    x = drawn(ROWS, CHANNELS, SIDE, SIDE)
    theirs = layer(x)
    set_attention(layer)
    assert apart(layer(x), theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_equals_diffusers(kind: str, name: str) -> None:
    unet, given = unet_of(kind), inputs(kind, [0, 1, 2])
    theirs = painted(unet, given)
    set_attention(unet, name)
    assert apart(painted(unet, given), theirs) < 1e-5
    other = given | {"encoder_hidden_states": -given["encoder_hidden_states"]}
    shows = kind != "Kandinsky 2.2"  # which reads its image embedding in place of a text
    assert (apart(painted(unet, other), theirs) > 1e-3) == shows


MIDDLE = COMMON | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["SD 1", "SD 2", "text in every attention", "middle"])
def test_evaluations_that_are_alike_until_they_read_are_one_in_the_first_layer(kind: str) -> None:
    of = [0, 0, 1, 1, 1]
    unet = randomised(UNet2DConditionModel(**MIDDLE).eval()) if kind == "middle" else unet_of(kind)
    given, rows = inputs("SD 1", of), torch.tensor([0, 1, 0, 1, 2])
    given |= {name: given[name][rows] for name in ("sample", "timestep")}
    theirs = painted(unet, given)
    set_attention(unet)
    seen: dict[str, int] = {}
    for name, module in unet.named_modules():
        if name.endswith("to_q"):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: len(x[0])}))
    assert apart(painted(unet, given, texts_of(of)), theirs) < 1e-5
    assert set(seen.values()) == {5}
    alike = Alike(torch.tensor([0, 1, 4]), rows)
    assert apart(painted(unet, given, texts_of(of), alike), theirs) < 1e-5
    fewer = [name for name, number in seen.items() if number == 3]
    first = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert fewer == (first if kind.startswith("SD") else [])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "argument"),
    [("SD 1", "encoder_attention_mask"), ("Karlo", "attention_mask"), ("Karlo", "encoder_attention_mask")],
)
def test_masks_reach_every_kernel_with_texts_kept_too(kind: str, argument: str) -> None:
    of = [0, 0, 1, 1]
    unet, given, texts = unet_of(kind), inputs(kind, of), texts_of(of)
    plain = painted(unet, given)
    given[argument] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])[of]
    theirs = painted(unet, given)
    assert apart(theirs, plain) > 1e-3
    for name in ON_CPU:
        set_attention(unet, name)
        assert apart(painted(unet, given), theirs) < 1e-5
        assert apart(painted(unet, given, texts), theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "flash"])
def test_torch_compile_traces_a_layer_whole(name: str) -> None:
    """Choosing a kernel is asked and not traced, and what is kept of texts goes in as tensors."""
    layer, given = layer_of("cross"), arguments("cross")
    theirs = layer(**given)
    set_attention(layer, name)
    states = given["encoder_hidden_states"]
    kwargs = reading(layer, Distinct.among(states.unbind(0)), torch.stack)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert apart(compiled(**given), theirs) < 1e-5
    assert kwargs is not None and apart(compiled(**given, **kwargs), theirs) < 1e-5
