"""Ours in the place of diffusers' attention processors: the same answers, texts projected once, nothing left behind."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor
from torch import Tensor, nn

from gen import Request, TextToImage, attention
from gen.attention import KERNELS, Kept, Processor, Shape, Texts, attentions, reading, restore_attention, set_attention
from gen.candidate import Candidate
from gen.conditioning import Conditions, Distinct, Table
from gen.lane import Pass, Plan
from gen.row import Row
from gen.rows import Rows
from tests.tiny import WIDTH, tiny_unet

ON_CPU = ["auto", "sdpa", "flash", "math"]
ROWS, HEADS, CHANNELS, SIDE, LENGTH = 3, 2, 32, 4, 5


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Choices are kept for the process: forget what a test with kernels of its own taught."""
    yield
    for function in (attention.refusal, attention.fastest, attention.chosen):
        function.cache_clear()


@pytest.fixture
def own(tiny_folder: Path) -> TextToImage:
    """A model of the test's own, to set processors on."""
    return TextToImage.from_pretrained(tiny_folder, device="cpu")


@pytest.fixture
def stock(tiny_folder: Path) -> TextToImage:
    """The same with diffusers' own processors."""
    model = TextToImage.from_pretrained(tiny_folder, device="cpu")
    restore_attention(model.model.unet)
    return model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: Any) -> Any:
    """All parameters drawn, norms and biases included, so that none can be left out unseen."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed) * (0.4 if parameter.ndim > 1 else 0.7))
    return module.eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


# --- one layer ---------------------------------------------------------------------------------------------------

ADDED: dict[str, Any] = {"added_kv_proj_dim": 12, "norm_num_groups": 4, "bias": True, "upcast_softmax": True}
ADDED |= {"cross_attention_dim": CHANNELS}
LAYERS: dict[str, dict[str, Any]] = {
    "self": {},
    "cross": {"cross_attention_dim": 12},
    "upcast": {"cross_attention_dim": 12, "upcast_attention": True, "upcast_softmax": True},
    "unscaled": {"scale_qk": False},
    "norm_q and norm_k": {"cross_attention_dim": 12, "qk_norm": "layer_norm"},
    "layer norm of the text": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
    "group norm of the text": {
        "cross_attention_dim": 12,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
    "spatial": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7, "bias": True},
    "spatial norm": {"norm_num_groups": 4, "spatial_norm_dim": 6, "residual_connection": True},
    "added": ADDED,
    "added alone": ADDED | {"only_cross_attention": True},
    "added, normed": ADDED | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
}


def layer_of(kind: str) -> Attention:
    options = LAYERS[kind]
    processor = AttnAddedKVProcessor2_0() if "added_kv_proj_dim" in options else None
    return randomised(Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS, processor=processor, **options))


def arguments(kind: str) -> dict[str, Any]:
    options, spatial = LAYERS[kind], kind.startswith(("spatial", "added"))
    given: dict[str, Any] = {"hidden_states": drawn(ROWS, CHANNELS, SIDE, SIDE)}
    if not spatial:
        given["hidden_states"] = given["hidden_states"].flatten(2).mT
    if "cross_attention_dim" in options:
        given["encoder_hidden_states"] = drawn(ROWS, LENGTH, 12, seed=1)
    if "spatial_norm_dim" in options:
        given["temb"] = drawn(ROWS, 6, SIDE, SIDE, seed=2)
    return given


def masks(kind: str) -> Iterator[Tensor | None]:
    """None, then a bias for each row's keys and one for each head's queries and keys, where stock takes them."""
    yield None
    told = "encoder_hidden_states" in arguments(kind)
    keys = LENGTH if told else SIDE * SIDE
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


# --- whole UNets -------------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16)}
COMMON |= {"layers_per_block": 1, "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4}
CROSS: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
CROSS |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SIMPLE: dict[str, Any] = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
SIMPLE |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
SIMPLE |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift"}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": CROSS,
    "SD 2": CROSS | {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)},
    "SD XL": CROSS
    | {"use_linear_projection": True, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"}
    | {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 + 6 * 4},
    "text in every attention": CROSS | {"only_cross_attention": True},
    "attention without text": CROSS | {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
    "Karlo": SIMPLE | {"class_embed_type": "identity"},
    "Karlo, text alone": SIMPLE | {"mid_block_only_cross_attention": True, "only_cross_attention": True},
    "Kandinsky 2.2": SIMPLE
    | {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 10},
}


def unet_of(kind: str) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**(COMMON | UNETS[kind])).eval()
    with torch.no_grad():
        for layer in attentions(unet):
            randomised(layer)  # or attention hardly shows
    return unet


def inputs(kind: str, of: Sequence[int]) -> dict[str, Any]:
    """Evaluation m of text of[m], every row with an x and a timestep of its own."""
    rows = len(of)
    told = drawn(max(of) + 1, LENGTH, 12, seed=5)[list(of)]
    given: dict[str, Any] = {"sample": drawn(rows, 4, 8, 8), "timestep": torch.arange(rows) * 100}
    given |= {"encoder_hidden_states": told}
    if kind == "SD XL":
        given["added_cond_kwargs"] = {"text_embeds": drawn(rows, 6, seed=6), "time_ids": drawn(rows, 6, seed=7)}
    if kind == "Karlo":
        given["class_labels"] = drawn(rows, 32, seed=8)
    if kind == "Kandinsky 2.2":
        given["added_cond_kwargs"] = {"image_embeds": drawn(max(of) + 1, 10, seed=9)[list(of)]}
    return given


def painted(unet: UNet2DConditionModel, given: dict[str, Any], texts: Distinct[Tensor] | None = None) -> Tensor:
    told = None
    if texts is not None:
        states = unet.process_encoder_hidden_states(given["encoder_hidden_states"], given.get("added_cond_kwargs"))
        of_text = {id(text): states[texts.of.index(place)] for place, text in enumerate(texts.unique)}
        told = reading(unet, texts, lambda new: torch.stack([of_text[id(text)] for text in new]))
    return unet(**given, cross_attention_kwargs=told).sample


def texts_of(of: Sequence[int]) -> Distinct[Tensor]:
    """What evaluations read, in the words of a call's conditions; the tokens only stand for the texts here."""
    tokens = [torch.empty(0) for _ in range(max(of) + 1)]
    return Distinct.among([tokens[text] for text in of])


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
    told = reading(layer, Distinct.among(states.unbind(0)), torch.stack)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert apart(compiled(**given), theirs) < 1e-5
    assert told is not None and apart(compiled(**given, **told), theirs) < 1e-5


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


def test_blocks_are_as_large_as_the_counts_allow() -> None:
    def blocks(of: list[int]) -> tuple[int, tuple[int, ...]]:
        texts = Texts.read(of, [])
        return texts.block, texts.of_block

    assert blocks([0, 0, 0, 1, 1, 1]) == (3, (0, 1))
    assert blocks([0, 0, 0, 0, 1, 1, 2, 2]) == (2, (0, 0, 1, 2))
    assert blocks([0, 0, 1]) == (1, (0, 0, 1))
    assert blocks([0, 0, 1, 1, 0, 0]) == (2, (0, 1, 0))
    assert blocks([0, 1, 0, 1]) == (1, (0, 1, 0, 1))  # equally many, but not side by side


# --- rows --------------------------------------------------------------------------------------------------------

WORDS = ["a small red circle", "a large blue square above a star"]
ASKED = [
    Request(prompt=WORDS[0], seed=7, num_images_per_prompt=3, rerank=False, output_type="latent"),
    Request(prompt=WORDS[1], seed=1, prior=False, negative_prompt="a star", rerank=False, output_type="latent"),
    Request(prompt=WORDS[0], seed=2, guidance_scale=1.0, num_inference_steps=6, rerank=False, output_type="latent"),
    Request(
        image_embeds=drawn(1, WIDTH), seed=2, num_inference_steps=2, sampler="heun", rerank=False, output_type="latent"
    ),
]


def test_pictures_are_the_stock_modules_whatever_is_beside_them(tiny: TextToImage, stock: TextToImage) -> None:
    """Unequal numbers of rows, joining and leaving, with an own image embedding, a negative prompt and no guidance."""
    for batch_size in (None, 2, 5):
        theirs = stock.paint(ASKED, batch_size=batch_size)
        for ours, other in zip(tiny.paint(ASKED, batch_size=batch_size), theirs, strict=True):
            assert apart(ours.images, other.images) < 1e-5


@pytest.mark.parametrize("name", ON_CPU)
def test_a_loaded_model_computes_by_the_kernel_it_was_given(name: str, tiny_folder: Path, stock: TextToImage) -> None:
    """And, asked for nothing, by what `auto` takes; keys and values of texts are kept either way."""
    told = {} if name == "auto" else {"attention": name}
    model = TextToImage.from_pretrained(tiny_folder, device="cpu", **told)
    layers = list(attentions(model.model.unet))
    assert layers and {layer.processor.name for layer in layers} == {name}
    seen: list[int] = []
    for layer in layers:
        if layer.is_cross_attention:
            layer.to_k.register_forward_hook(lambda *given: seen.append(len(given[1][0])))
    asked: dict[str, Any] = {"num_images_per_prompt": 3, "seed": 0, "rerank": False, "output_type": "latent"}
    assert apart(model("a star", **asked).images, stock("a star", **asked).images) < 1e-5
    crossing = sum(layer.is_cross_attention for layer in layers)
    # two texts in 4 steps of 3 pictures, and the twins of one with which a call was measured
    assert sum(seen) <= 4 * crossing


def test_a_kernel_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"^attention 'flsh' is unknown; choose from: auto, sdpa, flash, cudnn,"):
        TextToImage.from_pretrained("no such model", device="cpu", attention="flsh")
    with pytest.raises(ValueError, match=r"^attention 'cudnn' does not run in float32 on cpu"):
        TextToImage.from_pretrained("no such model", device="cpu", attention="cudnn")


def test_auto_measures_nothing_on_a_cpu(own: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is no cost to a command that paints one prompt."""

    def seconds(name: str, shape: Shape) -> list[float]:
        raise AssertionError(f"{name} was measured for {shape}")

    monkeypatch.setattr(attention, "seconds", seconds)
    own("a star", seed=0, rerank=False, output_type="latent")
    assert attention.fastest.cache_info().currsize > 0  # it was asked


def rows_at(model: TextToImage, prompts: Sequence[str], **settings: Any) -> list[Row]:
    asked = replace(model.model.abilities.defaults, prior=False, **settings)
    candidates = [Candidate(prompt=prompt, seed=seed, settings=asked) for seed, prompt in enumerate(prompts)]
    told = model.model.tell(candidates, Table())
    schedule, shape = model.model.levels.schedule(asked.sampler, asked.num_inference_steps), (4, 8, 8)
    return [
        Row(seed, seed, shape, schedule, asked.sampler, prompt, null=null, guidance_scale=asked.guidance_scale)
        for seed, (prompt, null) in enumerate(told)
    ]


def rows_over(model: TextToImage) -> Rows:
    return Rows(model.model.call, model.model.levels.scaling, "decoder")


def kept_by(unet: nn.Module) -> Kept:
    """What a network's processors keep, which is one object."""
    (kept,) = {layer.processor.kept for layer in attentions(unet)}
    return kept


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
    kept = kept_by(unet)
    assert len(kept.pairs) == 3 and len(kept.calls) == 1
    key_value = weakref.ref(next(iter(kept.pairs.values()))[0])
    rows.drop({0, 2})
    with torch.no_grad():
        rows.tick()
    assert len(kept.pairs) == 2 and key_value() is not None  # the other prompt's, and the empty one's
    rows.drop({1, 3})
    assert key_value() is None and len(kept.pairs) == len(kept.calls) == 0


def test_tokens_that_the_caller_keeps_do_not_keep_keys_and_values(own: TextToImage) -> None:
    unet = own.model.unet
    set_attention(unet)
    embeds = drawn(1, *own.model.text.shape)
    asked: dict[str, Any] = {"prior": False, "rerank": False, "output_type": "latent", "seed": 0}
    own(prompt_embeds=embeds, **asked)
    gc.collect()
    assert len(kept_by(unet).pairs) == len(kept_by(unet).calls) == 0


def test_texts_side_by_side_are_read_in_one_block_each(own: TextToImage) -> None:
    """Candidates with image embeddings of their own have conditions of their own, and still share their text."""
    model, asked = own.model, own.model.abilities.defaults
    candidates = [Candidate(prompt=WORDS[k // 2], seed=k, settings=asked) for k in range(4)]
    told = model.tell(candidates, Table())
    prompts = model.show(candidates, [prompt for prompt, _ in told], drawn(4, WIDTH).unbind(0))
    schedule = model.levels.schedule(asked.sampler, asked.num_inference_steps)
    rows = rows_over(own)
    rows.admit(
        [
            Row(seed, seed, (4, 8, 8), schedule, asked.sampler, prompt, null=null, guidance_scale=3.0)
            for seed, (prompt, (_, null)) in enumerate(zip(prompts, told, strict=True))
        ]
    )
    (lane,) = rows.lanes.values()
    conditions = Pass.of([lane], [Plan.of(lane, rows.device)], rows.device).conditions
    texts = Texts.read(Conditions(tuple(conditions)).distinct_tokens.of, [])
    assert len(set(conditions)) == 5 and (texts.block, texts.of_block) == (2, (0, 0, 1, 2))


# --- the switch --------------------------------------------------------------------------------------------------


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
        told = rf"attention '{name}' does not run in float32 on cpu \(.+\); choose from: auto, sdpa, flash, math$"
        with pytest.raises(ValueError, match=told):
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


def no_masks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As flash on CUDA."""
    if mask is not None:
        raise RuntimeError("masks are not\n supported")
    return KERNELS["math"](query, key, value, mask, scale)


@torch.no_grad()
def test_a_shape_that_the_kernel_does_not_take_is_left_to_torch_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(KERNELS, "flash", no_masks)
    layer, given = layer_of("cross"), arguments("cross")
    mask = 4 * drawn(ROWS, 1, LENGTH, seed=3)
    plain, masked = layer(**given), layer(**given, attention_mask=mask)
    set_attention(layer, "flash")
    with caplog.at_level(logging.INFO):
        assert apart(layer(**given), plain) < 1e-5
        assert not caplog.records
        for rows in (ROWS, 1, ROWS):
            some = {name: tensor[:rows] for name, tensor in given.items()}
            assert apart(layer(**some, attention_mask=mask[:rows]), masked[:rows]) < 1e-5
    assert [(one.levelname, one.name) for one in caplog.records] == [("WARNING", "gen.attention")]
    told = "attention 'flash' does not run for 2 heads of 16, 16 queries, 5 keys, masked, float32 on cpu, "
    assert caplog.messages == [told + "'sdpa' does it there: masks are not supported"]


CPU_SHAPE = Shape(torch.device("cpu"), torch.float32, heads=2, size=8, queries=16, keys=5)


@pytest.mark.parametrize(
    ("times", "takes"),
    [
        ({"sdpa": [1.0, 1.1, 1.2], "math": [0.5, 0.6, 0.7], "flash": [2.0, 2.0, 2.0]}, "math"),
        ({"sdpa": [1.0, 1.1, 1.2], "math": [0.5, 0.9, 0.6], "flash": [0.9, 0.9, 0.9]}, "sdpa"),  # not in every round
        ({"sdpa": [1.0, 1.0, 1.0], "math": [0.5, 0.5, 0.5], "flash": [0.45, 0.45, 0.45]}, "math"),  # hardly better
        ({"sdpa": [1.0, 1.0, 1.0], "math": [0.5, 0.5, 0.5], "flash": [0.3, 0.3, 0.3]}, "flash"),
    ],
)
def test_auto_leaves_torchs_choice_only_for_what_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, list[float]], takes: str
) -> None:
    monkeypatch.setitem(attention.CHALLENGERS, "cpu", ("math", "flash", "cudnn"))
    monkeypatch.setattr(attention, "seconds", lambda name, shape: times[name])  # cudnn, which cannot run, is not asked
    assert attention.chosen("auto", CPU_SHAPE) == takes


@torch.no_grad()
def test_auto_measures_a_shape_once_however_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Shape]] = []
    real = attention.seconds

    def seconds(name: str, shape: Shape) -> list[float]:
        asked.append((name, shape))
        return real(name, shape)

    monkeypatch.setitem(attention.CHALLENGERS, "cpu", ("math",))
    monkeypatch.setattr(attention, "seconds", seconds)
    unet, of = unet_of("SD 1"), [0, 0, 0, 1]
    set_attention(unet)
    for rows in (4, 3, 1):
        painted(unet, inputs("SD 1", of[:rows]), texts_of(of[:rows]))  # read in blocks of 1, 3 and 1
    shapes = {(shape.size, shape.queries, shape.keys) for _, shape in asked}
    assert shapes == {(4, 64, 64), (4, 64, LENGTH), (8, 16, 16), (8, 16, LENGTH)}
    assert len(asked) == len(set(asked)) == 2 * len(shapes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "cudnn", "efficient", "math"])
def test_every_kernel_of_a_gpu_is_close_to_float32(name: str) -> None:
    of = [0, 0, 1, 1]
    unet, given, texts = unet_of("SD 1"), inputs("SD 1", of), texts_of(of)
    exact = painted(unet, given)
    unet = unet.to("cuda", torch.float16)
    given = {k: v.to("cuda", torch.float16 if v.is_floating_point() else v.dtype) for k, v in given.items()}
    set_attention(unet, name)
    for read in (None, texts):
        assert apart(painted(unet, given, read).float().cpu(), exact) < 2e-2
