"""Processors put on a network and taken off: nothing left behind, nothing replaced that does more."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gen import TextToImage
from gen.attention.network import attentions, restore_attention, set_attention
from gen.attention.processor import Processor
from tests.attention import ON_CPU, apart
from tests.tiny import tiny_unet


@pytest.mark.parametrize("name", ON_CPU)
def test_a_loaded_model_computes_by_the_kernel_it_was_given(
    name: str, tiny_folder: Path, stock_tiny: TextToImage
) -> None:
    """And, asked for nothing, by what `auto` takes; keys and values of texts are kept either way."""
    words = {} if name == "auto" else {"attention": name}
    model = TextToImage.from_pretrained(tiny_folder, device="cpu", **words)
    layers = list(attentions(model.model.unet))
    assert layers and {layer.processor.name for layer in layers} == {name}
    seen: list[int] = []
    for layer in layers:
        if layer.is_cross_attention:
            layer.to_k.register_forward_hook(lambda *given: seen.append(len(given[1][0])))
    asked: dict[str, Any] = {"num_images_per_prompt": 3, "seed": 0, "rerank": False, "output_type": "latent"}
    assert apart(model("a star", **asked).images, stock_tiny("a star", **asked).images) < 1e-5
    crossing = sum(layer.is_cross_attention for layer in layers)
    # two texts in 4 steps of 3 pictures, and the twins of one with which a call was measured
    assert sum(seen) <= 4 * crossing


def test_restoring_leaves_the_module_as_it_was() -> None:
    unet = tiny_unet(None)
    before, keys = unet.attn_processors, list(unet.state_dict())
    for name in ("math", "flash", "auto"):  # one over the other
        set_attention(unet, name)
        assert all(isinstance(one, Processor) for one in unet.attn_processors.values())
        assert list(unet.state_dict()) == keys
    restore_attention(unet)
    after = unet.attn_processors
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    restore_attention(unet)
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_a_saved_model_does_not_know(own: TextToImage, tmp_path: Path) -> None:
    unet = own.model.unet
    unet.save_pretrained(tmp_path / "before")
    set_attention(unet, "math")
    own("a star", seed=0, rerank=False, output_type="latent")
    unet.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir()) and len(files) == 2
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_what_can_never_run_is_refused() -> None:
    unet = tiny_unet(None)
    with pytest.raises(ValueError, match="attention 'flsh' is unknown; choose from: auto, sdpa, flash, cudnn,"):
        set_attention(unet, "flsh")
    for name in ("cudnn", "efficient"):
        message = rf"attention '{name}' does not run in float32 on cpu \(.+\); choose from: auto, sdpa, flash, math$"
        with pytest.raises(ValueError, match=message):
            set_attention(unet, name)
    if find_spec("xformers") is None:
        with pytest.raises(ValueError, match=r"'xformers' does not run .* pip install 'unclip\[xformers\]'"):
            set_attention(unet, "xformers")
    assert not any(isinstance(layer.processor, Processor) for layer in attentions(unet))


class Weighted(nn.Module):
    """A processor with weights of its own, as IP-Adapter's."""


def test_processors_that_do_more_are_not_replaced() -> None:
    unet = tiny_unet(None)
    list(attentions(unet))[1].set_processor(Weighted())
    with pytest.raises(ValueError, match="attention 'auto' would replace a Weighted, which does more"):
        set_attention(unet)
