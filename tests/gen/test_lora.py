"""LoRAs of every layout: the merged weights by hand, stock diffusers' pictures, records, and files that do not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from gen import TextToImage, command
from gen.adapters.lora import layers_of, stability_names
from gen.families import Painter
from gen.picture import read_png
from tests.stock import LATENTS, PROMPTS, SEED, SHORT, apart, assert_same, start, stock_of
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl, make_tiny_stable_unclip

RANK, ALPHA, SCALE = 3, 6.0, 0.7
Layer = tuple[str, str]
Pairs = dict[Layer, tuple[Tensor, Tensor]]
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def pairs_of(model: Painter, *, only: str = "") -> Pairs:
    """Random factors of attentions, projections, convolutions and a timestep layer, down and up."""
    rng = torch.Generator().manual_seed(3)
    chosen = ("attn1.to_q", "attn2.to_v", "attn2.to_out.0", "q_proj", "out_proj")
    chosen += ("proj_in", "conv1", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "fc1", "ff.net.2")
    pairs = {}
    for layer, module in layers_of(model.parts()).items():
        if layer[1].endswith(chosen) and only in layer[1]:
            shape, tail = module.weight.shape, [1] * (module.weight.ndim - 2)
            down = torch.randn(RANK, *shape[1:], generator=rng) * 0.3
            pairs[layer] = (down, torch.randn(shape[0], RANK, *tail, generator=rng) * 0.3)
    assert len(pairs) >= 4
    return pairs


def full(layer: Layer) -> str:
    """A layer's name as files have it, which transformers 5 shortens for a tower without projection."""
    part, name = layer
    return f"text_model.{name.removeprefix('text_model.')}" if part.startswith("text") else name


def in_peft(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers writes it; the alpha is in what the file says of itself."""
    weights = {}
    for layer, (down, up) in pairs.items():
        weights |= {f"{layer[0]}.{full(layer)}.lora_A.weight": down, f"{layer[0]}.{full(layer)}.lora_B.weight": up}
    said: dict[str, Any] = {}
    for part in dict.fromkeys(part for part, _ in pairs):
        names = [name.removeprefix("text_model.") for of, name in pairs if of == part]
        said |= {f"{part}.r": RANK, f"{part}.lora_alpha": ALPHA, f"{part}.target_modules": names}
    return weights, {"format": "pt", "lora_adapter_metadata": json.dumps(said)}


def in_kohya(pairs: Pairs, name_of: Callable[[Layer], str] = full) -> tuple[dict[str, Tensor], dict[str, str]]:
    weights = {}
    for layer, (down, up) in pairs.items():
        stem = KOHYA[layer[0]] + name_of(layer).replace(".", "_")
        weights |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(ALPHA),
        }
    return weights, {}


def in_stability(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As kohya's trainer names XL's layers: the second tower's number is 2, so the first one's is 1."""

    def name_of(layer: Layer) -> str:
        return [full(layer), *stability_names(layer[1], 1)][-1] if layer[0] == "unet" else full(layer)

    weights, said = in_kohya(pairs, name_of)
    return {key.replace("lora_te_", "lora_te1_"): value for key, value in weights.items()}, said


def in_processors(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers wrote it in 2023; nothing says an alpha, so it is the rank."""
    weights = {}
    for layer, (down, up) in pairs.items():
        name, at = full(layer), "lora"
        for attention in ("attn1", "attn2"):
            if f".{attention}.to_" in name:
                name = name.replace(f"{attention}.to_", f"{attention}.processor.to_").replace("to_out.0", "to_out")
                at = "_lora"
        if layer[0] != "unet":
            at = "lora_linear_layer"
        stem = f"{layer[0]}.{name}{'' if at.startswith('_') else '.'}{at}"
        weights |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return weights, {}


LAYOUTS = {"peft": in_peft, "kohya": in_kohya, "stability": in_stability, "processors": in_processors}


def write(path: Path, layout: str, pairs: Pairs) -> Path:
    weights, said = LAYOUTS[layout](pairs)
    save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata=said or None)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    return {"1": make_tiny_stable_diffusion(root / "1"), "xl": make_tiny_stable_diffusion_xl(root / "xl")}


def loaded(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


def weights_of(model: TextToImage) -> dict[Layer, Tensor]:
    parts = {name: part for name, part in model.model.parts().items() if isinstance(part, nn.Module)}
    return {(name, key): value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("1", "peft"), ("1", "kohya"), ("1", "processors"), ("xl", "peft"), ("xl", "kohya"), ("xl", "stability")],
)
def test_merged_weights_by_hand(folders: dict[str, Path], tmp_path: Path, kind: str, layout: str) -> None:
    model = loaded(folders[kind])
    pairs = pairs_of(model.model)
    assert {part for part, _ in pairs} == {"unet", "text_encoder"} | ({"text_encoder_2"} if kind == "xl" else set())
    before = weights_of(model)
    model.load_lora(write(tmp_path / "a.safetensors", layout, pairs), SCALE)
    after = weights_of(model)
    weight = SCALE * (1.0 if layout == "processors" else ALPHA / RANK)
    for layer, (down, up) in pairs.items():
        part, name = layer
        key = (part, f"{name}.weight")
        expected = torch.einsum("or,ri...->oi...", up.flatten(1), down) * weight
        torch.testing.assert_close(after[key] - before[key], expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 1e-2
        before[key] = after[key]
    assert all(torch.equal(after[key], before[key]) for key in before)  # no other weight moved


def test_what_is_saved_stock_paints_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    model, plain = loaded(folders["1"]), loaded(folders["1"])
    path = write(tmp_path / "a.safetensors", "kohya", pairs_of(model.model))
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 5, "output_type": "latent"}
    before = model(SHORT, **asked).images  # and what it keeps of texts must not outlive the merge
    model.load_lora(path, SCALE)
    after = model(SHORT, **asked).images
    assert torch.equal(before, plain(SHORT, **asked).images) and apart(after, before) > 1e-2
    assert_same(model, stock_of(StableDiffusionPipeline, model.save(tmp_path / "saved")), PROMPTS, 1)


@pytest.mark.parametrize(("kind", "layout"), [("1", "peft"), ("1", "kohya"), ("xl", "peft"), ("xl", "kohya")])
def test_stock_diffusers_fuses_the_same(folders: dict[str, Path], tmp_path: Path, kind: str, layout: str) -> None:
    pytest.importorskip("peft")
    model = loaded(folders[kind])
    path = write(tmp_path / "a.safetensors", layout, pairs_of(model.model))
    stock = stock_of({"1": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}[kind], folders[kind])
    stock.load_lora_weights(path.parent, weight_name=path.name)
    stock.fuse_lora(lora_scale=SCALE)
    model.load_lora(path, SCALE)
    asked: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
    theirs = stock(PROMPTS, latents=start(2, 1), **asked).images
    assert apart(model(PROMPTS, seed=SEED, **asked).images, theirs) <= LATENTS


def test_names_in_stabilitys_code() -> None:
    """As published files of Stable Diffusion XL have them, of two residual blocks a level."""
    for layer, name in {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.transformer_blocks.0.norm": "input_blocks.4.1.transformer_blocks.0.norm",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.resnets.0.conv_shortcut": "output_blocks.3.0.skip_connection",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        assert name in list(stability_names(layer, 2)), layer
    assert list(stability_names("conv_norm_out", 2)) == []


def test_a_tower_that_clip_shares_is_copied_first(tmp_path: Path) -> None:
    """What ranks, and what the prior reads, stay as they were."""
    model = loaded(make_tiny_stable_unclip(tmp_path / "model"))
    clip, prior = model.model.clip, model.model.prior
    assert clip is not None and prior is not None and model.model.text.encoder is clip.model.text_model
    texts = model.model.text([SHORT]).tokens, clip.text(SHORT).embedding, prior.text([SHORT]).tokens
    model.load_lora(write(tmp_path / "a.safetensors", "kohya", pairs_of(model.model)))
    torch.testing.assert_close(clip.text(SHORT).embedding, texts[1])
    torch.testing.assert_close(prior.text([SHORT]).tokens, texts[2])
    assert (model.model.text([SHORT]).tokens - texts[0]).abs().max() > 1e-2


def test_several_add_up_and_half_precision_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    model = TextToImage.from_pretrained(folders["1"], device="cpu", dtype=torch.float16)
    path = write(tmp_path / "a.safetensors", "kohya", pairs_of(model.model, only="attn1"))
    before = weights_of(model)
    model.load_lora(path, 2.0)
    model.load_lora(tmp_path, -2.0)  # the only file of its folder
    after = weights_of(model)
    assert all(value.dtype == torch.float16 for value in after.values() if value.is_floating_point())
    assert max(float((after[key] - before[key]).abs().max()) for key in before) < 1e-2
    assert [each.scale for each in model.adapters] == [2.0, -2.0]


# --- records ---------------------------------------------------------------------------------------------------------


def test_the_command_line_and_its_record(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.safetensors", "peft", pairs_of(loaded(folders["1"]).model))
    arguments = ["generate", SHORT, "-n", "1", "--steps", "2", "--model", str(folders["1"]), "--quiet"]
    arguments += ["--lora", f"{path}:0.5", "--lora", str(path), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    picture = Path(capsys.readouterr().out.strip())
    record = read_png(picture)[1]
    adapters = record["adapters"]
    assert [(each["kind"], each["name"], each["scale"]) for each in adapters] == [
        ("lora", str(path), 0.5),
        ("lora", str(path), 1.0),
    ]
    assert command.main(["reproduce", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] <= 1
    model = loaded(folders["1"])
    with pytest.raises(
        ValueError, match=r"was painted with other adapters: lora '.*' x 0.5 .*; here are none"
    ) as error:
        model.repaint(record)
    assert "\n" not in str(error.value)
    for damaged in ({}, [{}], [{"kind": "lora", "name": "a", "hash": "b", "scale": "1"}]):
        with pytest.raises(ValueError, match="the record is damaged: its adapters"):
            model.load_again({"adapters": damaged})
    with pytest.raises(ValueError, match="an adapter of kind 'tune', which is not known here"):
        model.load_again({"adapters": [adapters[0] | {"kind": "tune"}]})
    write(path, "peft", {layer: (down * 2, up) for layer, (down, up) in pairs_of(model.model).items()})
    assert command.main(["reproduce", str(picture)]) == 2  # another file of that name
    assert "was painted with other adapters" in capsys.readouterr().err


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_change_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["1"])
    before = weights_of(model)
    pairs = pairs_of(model.model)
    weights, said = in_kohya(pairs)
    path = tmp_path / "a.safetensors"

    def refused(told: str, change: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> None:
        left = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(left, path, metadata=metadata)
        with pytest.raises(ValueError, match=told) as error:
            model.load_lora(path)
        assert "\n" not in str(error.value)

    key = "lora_unet_mid_block_attentions_0_proj_in"
    others = {f"lora_unet_elsewhere_{k}.lora_up.weight": torch.zeros(2, 2) for k in range(7)}
    names = ", ".join(sorted(others)[:5])
    refused(f"is of another base model: weights {names} and 2 more are of no layer here", others)
    wrong = {f"{key}.lora_down.weight": torch.zeros(RANK, 5, 1, 1)}
    refused("is of another base model: weight unet mid_block.attentions.0.proj_in is of another shape here", wrong)
    refused(
        "is damaged: weight unet mid_block.attentions.0.proj_in is without up or down", {f"{key}.lora_up.weight": None}
    )
    for wrong, tensor in (
        ("lora_up.weight", torch.full_like(weights[f"{key}.lora_up.weight"], torch.nan)),
        ("alpha", torch.tensor(torch.inf)),
    ):
        told = rf"^file '.*a\.safetensors' is damaged: its {key}.{wrong} has numbers that are not finite"
        refused(told, {f"{key}.{wrong}": tensor})
    inner, outer = weights[f"{key}.lora_down.weight"].shape[1], weights[f"{key}.lora_up.weight"].shape[0]
    nothing = {"lora_down": torch.zeros(0, inner, 1, 1), "lora_up": torch.zeros(outer, 0, 1, 1)}
    layer = "unet mid_block.attentions.0.proj_in"
    for tensors, wrong in (
        ({f"{key}.{name}.weight": tensor for name, tensor in nothing.items()}, "(down|up) of .* is no matrix"),
        ({f"{key}.lora_down.weight": torch.zeros(RANK)}, rf"down of {layer} has shape \({RANK},\), which is no matrix"),
        ({f"{key}.alpha": torch.ones(2)}, rf"alpha of {layer} has shape \(2,\), which is no number"),
    ):
        refused(f"^LoRA '.*' is damaged: {wrong}", tensors)
    refused("cannot be read: weight .*hada_w1_a is neither up, down nor alpha", {f"{key}.hada_w1_a": torch.zeros(2)})
    refused("is a DoRA", {}, {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    refused("lora_adapter_metadata is no JSON", {}, {"lora_adapter_metadata": "{"})
    refused("its lora_adapter_metadata is no object", {}, {"lora_adapter_metadata": "[]"})
    for damaged in ({"unet.lora_alpha": "6"}, {"unet.alpha_pattern": ["conv1"]}, {"unet.alpha_pattern": {"(": 1}}):
        refused(f"is damaged: its {next(iter(damaged))} is", {}, {"lora_adapter_metadata": json.dumps(damaged)})
    refused("holds nothing", dict.fromkeys(weights))
    for scale in (float("nan"), "1"):
        with pytest.raises(ValueError, match=r"scale=.* is (out of range|of type str)"):
            model.load_lora(path, scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LoRA=None is of type NoneType; give a name or a path"):
        model.load_lora(None)  # type: ignore[arg-type]
    path.write_bytes(write(path, "kohya", pairs).read_bytes()[:50])
    with pytest.raises(ValueError, match=r"^file '.*a\.safetensors' is damaged"):
        model.load_lora(path)
    for name, told in (
        ("nowhere", "is no file; give a .safetensors file, a folder with one, or a hub id"),
        ("owner/name", "cannot be fetched from the hub"),
        (tmp_path / "b.pt", "may hold pickle, which is never read"),
        ("owner/name/b.bin", "is no .safetensors file; others may hold pickle, which is never read"),
        (tmp_path / "two", r"has a.safetensors, b.safetensors; name one of them"),
        (folders["1"], r"has no .safetensors file"),
    ):
        (tmp_path / "b.pt").write_bytes(b"")
        (tmp_path / "two").mkdir(exist_ok=True)
        for letter in "ab":
            (tmp_path / "two" / f"{letter}.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=f"^LoRA '{name}' .*{told}"):
            model.load_lora(name)
    after = weights_of(model)
    assert all(torch.equal(after[key], before[key]) for key in before) and model.adapters == ()
    assert said == {}


def test_rank_stabilised_and_alpha_by_layer(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["1"])
    pairs = pairs_of(model.model, only="attn1.to_q")
    weights, _ = in_peft(pairs)
    (first, *_), before = pairs, weights_of(model)
    said = {"unet.lora_alpha": 4.0, "unet.use_rslora": True, "unet.alpha_pattern": {first[1]: 2.0}}
    save_file(weights, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    model.load_lora(tmp_path / "a.safetensors")
    after = weights_of(model)
    for (part, name), (down, up) in pairs.items():
        alpha = 2.0 if (part, name) == first else 4.0
        moved = after[part, f"{name}.weight"] - before[part, f"{name}.weight"]
        torch.testing.assert_close(moved, alpha / RANK**0.5 * up @ down, atol=1e-5, rtol=1e-4)


def test_alpha_by_layer_of_a_text_tower(folders: dict[str, Path], tmp_path: Path) -> None:
    """Patterns are peft's: the end of a name, from a dot on, with or without what transformers leaves out."""
    model = loaded(folders["1"])
    pairs = {layer: each for layer, each in pairs_of(model.model).items() if layer[0] == "text_encoder"}
    alphas = {"q_proj": 2.0, "text_model.encoder.layers.0.mlp.fc1": 3.0, "self_attn.(out|none)_proj": 4.0, "proj": 5.0}
    weights, _ = in_peft(pairs)
    said = {"text_encoder.lora_alpha": 1.0, "text_encoder.alpha_pattern": alphas}
    before = weights_of(model)
    save_file(weights, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    model.load_lora(tmp_path / "a.safetensors")
    after, seen = weights_of(model), set()
    for (part, name), (down, up) in pairs.items():
        expected = {"q_proj": 2.0, "out_proj": 4.0, "fc1": 3.0 if ".0." in name else 1.0}[name.rpartition(".")[2]]
        moved = after[part, f"{name}.weight"] - before[part, f"{name}.weight"]
        torch.testing.assert_close(moved, expected / RANK * up @ down, atol=1e-5, rtol=1e-4)
        seen.add(expected)
    assert seen >= {2.0, 3.0, 4.0}


def test_stock_reads_alphas_of_a_text_tower_alike(folders: dict[str, Path], tmp_path: Path) -> None:
    """By names as transformers 5 has them; those that begin with `text_model.` it overlooks, and they mean the same."""
    pytest.importorskip("peft")
    pairs = {layer: each for layer, each in pairs_of(loaded(folders["1"]).model).items() if layer[0] == "text_encoder"}
    weights, described = in_peft(pairs)
    fused = []
    for ahead in ("", "text_model."):
        said = json.loads(described["lora_adapter_metadata"])
        said["text_encoder.alpha_pattern"] = {f"{ahead}encoder.layers.0.mlp.fc1": 1.5}
        save_file(weights, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
        model = loaded(folders["1"])
        model.load_lora(tmp_path, SCALE)
        fused.append(model.model.parts()["text_encoder"].state_dict())
        if not ahead:
            stock = stock_of(StableDiffusionPipeline, folders["1"])
            stock.load_lora_weights(tmp_path, weight_name="a.safetensors")
            stock.fuse_lora(components=["text_encoder"], lora_scale=SCALE)
            stock.unload_lora_weights()
            fused.append(stock.text_encoder.state_dict())
    for key, value in fused[0].items():
        for other in fused[1:]:
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4)


# --- peft's own folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part"), [("1", "unet"), ("1", "text_encoder"), ("xl", "text_encoder"), ("xl", "text_encoder_2")]
)
def test_what_peft_saves_is_merged_as_peft_merges_it(
    folders: dict[str, Path], tmp_path: Path, kind: str, part: str
) -> None:
    """Ranks and alphas by layer; the file says none of its part, which its layers and their widths tell."""
    peft = pytest.importorskip("peft")
    model = loaded(folders[kind])
    theirs = copy.deepcopy(model.model.with_own_texts().parts()[part])
    plain = copy.deepcopy(theirs)
    chosen = ["to_q", "conv1", "ff.net.2"] if part == "unet" else ["q_proj", "fc1"]
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=chosen,
        rank_pattern={chosen[0]: 2},
        alpha_pattern={f".*0.*{chosen[1]}": 1.0},
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path)
    before = weights_of(model)
    model.load_lora(tmp_path, SCALE)
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().state_dict()
    after = weights_of(model)
    moved = set()
    for (of, key), value in after.items():
        if of == part:
            torch.testing.assert_close(
                value - before[of, key], SCALE * (merged[key] - before[of, key]), atol=1e-5, rtol=1e-4
            )
            moved |= {key} if not torch.equal(value, before[of, key]) else set()
        else:
            assert torch.equal(value, before[of, key])
    assert {key for key in merged if key.removesuffix(".weight").endswith(tuple(chosen))} == moved


def test_of_peft_the_configuration_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["1"])
    weights, _ = in_peft(pairs_of(model.model, only="attn1.to_q"))
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("unet.", "base_model.model.", 1): value for key, value in weights.items()}, path)
    beside = tmp_path / "adapter_config.json"
    with pytest.raises(ValueError, match=r"is peft's own and has no adapter_config\.json beside it"):
        model.load_lora(path)
    said = {"peft_type": "LORA", "lora_alpha": ALPHA, "init_lora_weights": True}
    for damage, told in (
        ({"peft_type": "LOHA"}, "is of peft's kind 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "started from 'pissa', which changes the base model"),
        ({"use_dora": True}, "is a DoRA"),
    ):
        beside.write_text(json.dumps(said | damage))
        with pytest.raises(ValueError, match=told):
            model.load_lora(path)
    hashes = []
    for alpha in (ALPHA, 2 * ALPHA):
        beside.write_text(json.dumps(said | {"lora_alpha": alpha}))
        model.load_lora(path)
        hashes.append(model.adapters[-1].hash)
    assert hashes[0] != hashes[1]  # for the pictures differ
