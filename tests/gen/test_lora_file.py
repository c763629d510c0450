"""What a LoRA's file says: alphas of every kind, peft's own folders, and files that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from tests.lora import ALPHA, RANK, SCALE, in_kohya, in_peft, loaded, pairs_of, weights_of, write
from tests.stock import stock_of


def test_files_that_do_not_fit_change_nothing(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(stable_diffusion_folders["1"])
    before = weights_of(model)
    pairs = pairs_of(model.model)
    weights, described = in_kohya(pairs)
    path = tmp_path / "a.safetensors"

    def refused(message: str, change: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> None:
        left = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(left, path, metadata=metadata)
        with pytest.raises(ValueError, match=message) as error:
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
        pattern = rf"^file '.*a\.safetensors' is damaged: its {key}.{wrong} has numbers that are not finite"
        refused(pattern, {f"{key}.{wrong}": tensor})
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
    for name, pattern in (
        ("nowhere", "is no file; give a .safetensors file, a folder with one, or a hub id"),
        ("owner/name", "cannot be fetched from the hub"),
        (tmp_path / "b.pt", "may hold pickle, which is never read"),
        ("owner/name/b.bin", "is no .safetensors file; others may hold pickle, which is never read"),
        (tmp_path / "two", r"has a.safetensors, b.safetensors; name one of them"),
        (stable_diffusion_folders["1"], r"has no .safetensors file"),
    ):
        (tmp_path / "b.pt").write_bytes(b"")
        (tmp_path / "two").mkdir(exist_ok=True)
        for letter in "ab":
            (tmp_path / "two" / f"{letter}.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=f"^LoRA '{name}' .*{pattern}"):
            model.load_lora(name)
    after = weights_of(model)
    assert all(torch.equal(after[key], before[key]) for key in before) and model.adapters == ()
    assert described == {}


def test_rank_stabilised_and_alpha_by_layer(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(stable_diffusion_folders["1"])
    pairs = pairs_of(model.model, only="attn1.to_q")
    weights, _ = in_peft(pairs)
    (first, *_), before = pairs, weights_of(model)
    config = {"unet.lora_alpha": 4.0, "unet.use_rslora": True, "unet.alpha_pattern": {first[1]: 2.0}}
    save_file(weights, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    model.load_lora(tmp_path / "a.safetensors")
    after = weights_of(model)
    for (part, name), (down, up) in pairs.items():
        alpha = 2.0 if (part, name) == first else 4.0
        moved = after[part, f"{name}.weight"] - before[part, f"{name}.weight"]
        torch.testing.assert_close(moved, alpha / RANK**0.5 * up @ down, atol=1e-5, rtol=1e-4)


def test_alpha_by_layer_of_a_text_tower(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    """Patterns are peft's: the end of a name, from a dot on, with or without what transformers leaves out."""
    model = loaded(stable_diffusion_folders["1"])
    pairs = {layer: each for layer, each in pairs_of(model.model).items() if layer[0] == "text_encoder"}
    alphas = {"q_proj": 2.0, "text_model.encoder.layers.0.mlp.fc1": 3.0, "self_attn.(out|none)_proj": 4.0, "proj": 5.0}
    weights, _ = in_peft(pairs)
    config = {"text_encoder.lora_alpha": 1.0, "text_encoder.alpha_pattern": alphas}
    before = weights_of(model)
    save_file(weights, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    model.load_lora(tmp_path / "a.safetensors")
    after, seen = weights_of(model), set()
    for (part, name), (down, up) in pairs.items():
        expected = {"q_proj": 2.0, "out_proj": 4.0, "fc1": 3.0 if ".0." in name else 1.0}[name.rpartition(".")[2]]
        moved = after[part, f"{name}.weight"] - before[part, f"{name}.weight"]
        torch.testing.assert_close(moved, expected / RANK * up @ down, atol=1e-5, rtol=1e-4)
        seen.add(expected)
    assert seen >= {2.0, 3.0, 4.0}


def test_stock_reads_alphas_of_a_text_tower_alike(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    """By names as transformers 5 has them; those that begin with `text_model.` it overlooks, and they mean the same."""
    pytest.importorskip("peft")
    pairs = {
        layer: each
        for layer, each in pairs_of(loaded(stable_diffusion_folders["1"]).model).items()
        if layer[0] == "text_encoder"
    }
    weights, described = in_peft(pairs)
    fused = []
    for ahead in ("", "text_model."):
        config = json.loads(described["lora_adapter_metadata"])
        config["text_encoder.alpha_pattern"] = {f"{ahead}encoder.layers.0.mlp.fc1": 1.5}
        save_file(weights, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
        model = loaded(stable_diffusion_folders["1"])
        model.load_lora(tmp_path, SCALE)
        fused.append(model.model.parts()["text_encoder"].state_dict())
        if not ahead:
            stock = stock_of(StableDiffusionPipeline, stable_diffusion_folders["1"])
            stock.load_lora_weights(tmp_path, weight_name="a.safetensors")
            stock.fuse_lora(components=["text_encoder"], lora_scale=SCALE)
            stock.unload_lora_weights()
            fused.append(stock.text_encoder.state_dict())
    for key, value in fused[0].items():
        for other in fused[1:]:
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "part"), [("1", "unet"), ("1", "text_encoder"), ("xl", "text_encoder"), ("xl", "text_encoder_2")]
)
def test_what_peft_saves_is_merged_as_peft_merges_it(
    stable_diffusion_folders: dict[str, Path], tmp_path: Path, kind: str, part: str
) -> None:
    """Ranks and alphas by layer; the file says none of its part, which its layers and their widths tell."""
    peft = pytest.importorskip("peft")
    model = loaded(stable_diffusion_folders[kind])
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


def test_of_peft_the_configuration_counts(stable_diffusion_folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(stable_diffusion_folders["1"])
    weights, _ = in_peft(pairs_of(model.model, only="attn1.to_q"))
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("unet.", "base_model.model.", 1): value for key, value in weights.items()}, path)
    beside = tmp_path / "adapter_config.json"
    with pytest.raises(ValueError, match=r"is peft's own and has no adapter_config\.json beside it"):
        model.load_lora(path)
    config = {"peft_type": "LORA", "lora_alpha": ALPHA, "init_lora_weights": True}
    for damage, message in (
        ({"peft_type": "LOHA"}, "is of peft's kind 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "started from 'pissa', which changes the base model"),
        ({"use_dora": True}, "is a DoRA"),
    ):
        beside.write_text(json.dumps(config | damage))
        with pytest.raises(ValueError, match=message):
            model.load_lora(path)
    hashes = []
    for alpha in (ALPHA, 2 * ALPHA):
        beside.write_text(json.dumps(config | {"lora_alpha": alpha}))
        model.load_lora(path)
        hashes.append(model.adapters[-1].hash)
    assert hashes[0] != hashes[1]  # for the pictures differ
