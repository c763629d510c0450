"""Pictures beside the text: stock diffusers' IP-Adapter on tiny weights, batches of all kinds, records, other files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clip_core import hub
from gen import Request, TextToImage, command
from gen.attention.network import attentions
from gen.families.reader import Reader
from gen.picture import read_png
from tests.hub import cached
from tests.pictures import noise
from tests.stock import LONG, PROMPTS, SEED, SHORT, apart, assert_same, stock_of
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl

E, TOKENS, SCALE = 12, 4, 0.6
HIDDEN, STATES = 16, 17  # of the image encoder: its states' width, and their number: 4 x 4 patches and one
INNER, HEAD = 16, 64  # of Plus: its own width, and that of its one head, which files do not say
KINDS = {"plain": "", "Plus": "-plus", "Full Face": "-full"}  # and how their files end here
STOCK = {"1": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


def adapter_of(unet: UNet2DConditionModel, kind: str) -> dict[str, Tensor]:
    """A tiny adapter of a UNet, as published files name it: self-attentions are counted and have nothing."""
    rng = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng) * 0.5

    def norm(name: str, wide: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(wide) + 1, f"{name}.bias": random(wide)}

    def linear(name: str, wide: int, reads: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(wide, reads), f"{name}.bias": random(wide)}

    if kind == "plain":
        tensors = linear("proj", TOKENS * width, E) | norm("norm", width)
    elif kind == "Full Face":
        tensors = linear("proj.0", HIDDEN, HIDDEN) | linear("proj.2", width, HIDDEN) | norm("proj.3", width)
    else:
        tensors = {"latents": random(1, TOKENS, INNER)} | linear("proj_in", INNER, HIDDEN)
        tensors |= linear("proj_out", width, INNER) | norm("norm_out", width)
        for layer in (f"layers.{k}" for k in range(4)):
            tensors |= norm(f"{layer}.0.norm1", INNER) | norm(f"{layer}.0.norm2", INNER) | norm(f"{layer}.1.0", INNER)
            tensors |= {
                f"{layer}.0.to_q.weight": random(HEAD, INNER),
                f"{layer}.0.to_kv.weight": random(2 * HEAD, INNER),
            }
            tensors |= {f"{layer}.0.to_out.weight": random(INNER, HEAD) * 0.2}
            tensors |= {
                f"{layer}.1.1.weight": random(4 * INNER, INNER),
                f"{layer}.1.3.weight": random(INNER, 4 * INNER),
            }
    weights = {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
    for place, layer in enumerate(attentions(unet)):
        if layer.is_cross_attention:
            for each in "kv":
                weights[f"ip_adapter.{place}.to_{each}_ip.weight"] = random(layer.inner_dim, width)
    return weights


def save_encoder(folder: Path, seed: int = 0, hidden: int = HIDDEN) -> None:
    vision = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPVisionConfig(**vision, image_size=32, patch_size=8, projection_dim=E, initializer_factor=5.0)
        CLIPVisionModelWithProjection(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `1` and `xl`, and a folder `ip` with adapters of each and the image encoder beside them."""
    root = tmp_path_factory.mktemp("ip")
    make_tiny_stable_diffusion(root / "1")
    make_tiny_stable_diffusion_xl(root / "xl")
    save_encoder(root / "ip" / "image_encoder")
    for family in STOCK:
        unet = UNet2DConditionModel.from_pretrained(root / family / "unet")
        for kind, ending in KINDS.items():
            save_file(adapter_of(unet, kind), root / "ip" / f"{family}{ending}.safetensors")
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> TextToImage:
    model = TextToImage.from_pretrained(root / "1", device="cpu")
    model.load_ip_adapter(root / "ip" / "1.safetensors", SCALE)
    return model


def picture(seed: int = 0) -> Image.Image:
    """Of the encoder's own size, where no resize of transformers' can differ by a level."""
    return noise(seed, (32, 32))


@pytest.mark.parametrize(
    ("family", "kind"), [("1", "plain"), ("xl", "plain"), ("1", "Plus"), ("xl", "Plus"), ("1", "Full Face")]
)
def test_stock_paints_the_same(root: Path, family: str, kind: str) -> None:
    model = TextToImage.from_pretrained(root / family, device="cpu")
    file = f"{family}{KINDS[kind]}.safetensors"
    model.load_ip_adapter(root / "ip" / file, SCALE)
    stock = stock_of(STOCK[family], root / family)
    stock.load_ip_adapter(str(root / "ip"), subfolder="", weight_name=file)
    stock.set_ip_adapter_scale(SCALE)
    for number, guided in ((1, {"guidance_scale": 1.0}), (3, {"guidance_scale": 5.0, "negative_prompt": ["blue"]})):
        asked: dict[str, Any] = {"num_inference_steps": 4, "ip_adapter_image": picture(), **guided}
        assert_same(model, stock, [SHORT], number, **asked)


@pytest.mark.parametrize("kind", ["Plus", "Full Face"])
def test_kinds_that_read_states(root: Path, tmp_path: Path, kind: str) -> None:
    """The picture shows, a batch with others changes nothing, and a record has the picture's hash and path."""
    file = root / "ip" / f"1{KINDS[kind]}.safetensors"
    model = TextToImage.from_pretrained(root / "1", device="cpu")
    model.load_ip_adapter(file, SCALE)
    asked: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "seed": SEED}
    picture(1).save(tmp_path / "shown.png")
    requests = [
        Request(prompt=SHORT, **asked, ip_adapter_image=one) for one in (None, picture(), tmp_path / "shown.png")
    ]
    together = [result.images for result in model.paint(requests)]
    alone = [model.paint([request])[0] for request in requests]
    for ours, one in zip(together, alone, strict=True):
        assert (ours - one.images).abs().max() <= 1 / 255
    assert (together[0] - together[1]).abs().max() > 0.02 and (together[1] - together[2]).abs().max() > 0.02
    embeds = model.embed_ip_adapter_image([picture(), tmp_path / "shown.png"])
    assert embeds.shape == (2, STATES, HIDDEN)
    given = model([SHORT] * 2, ip_adapter_image_embeds=embeds, **asked)
    assert (given.images - torch.cat(together[1:])).abs().max() <= 1 / 255
    # records
    with pytest.raises(ValueError, match=r"painted from tensors \(ip_adapter_image_embeds\)"):
        model.repaint(given.records[0])
    records = [json.loads(json.dumps(one.records[0])) for one in alone]
    assert torch.equal(model.repaint(records[2]), alone[2].images[0])
    assert torch.equal(model.repaint(records[1], [picture()]), alone[1].images[0])
    with pytest.raises(ValueError, match="the ip_adapter_image was a picture that its record has no file of"):
        model.repaint(records[1])
    with pytest.raises(ValueError, match="ip_adapter_image was given, but this model has no IP-Adapter"):
        TextToImage.from_pretrained(root / "1", device="cpu").repaint(records[1] | {"adapters": []}, [picture()])
    # another encoder is another adapter
    save_encoder(tmp_path / "other", seed=1)
    model.load_ip_adapter(file, SCALE, tmp_path / "other")
    with pytest.raises(ValueError, match="was painted with other adapters"):
        model.repaint(records[1], [picture()])
    (record,) = model(SHORT, ip_adapter_image=picture(), **asked).records
    again = TextToImage.from_pretrained(root / "1", device="cpu")
    again.load_again(record)
    assert again.adapters == model.adapters and record["adapters"][0]["image_encoder"] == str(tmp_path / "other")


def test_all_else_is_checked_before_a_picture_is_embedded(root: Path) -> None:
    model = TextToImage.from_pretrained(root / "1", device="cpu")
    model.load_ip_adapter(root / "ip" / "1.safetensors")
    assert isinstance(model.model, Reader) and model.model.ip_adapter is not None
    encoder = model.model.ip_adapter.encoder
    assert encoder is not None
    ran = []
    encoder.tower.register_forward_hook(lambda *_: ran.append(1))
    for wrong in ({"num_inference_steps": 0}, {"latents": torch.zeros(1)}, {"sampler": "eular"}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
            model(SHORT, ip_adapter_image=picture(), **wrong)
    assert not ran
    model(SHORT, ip_adapter_image=picture(), num_inference_steps=1, num_images_per_prompt=3)
    assert len(ran) == 1  # once for all


def test_of_a_hub_repository_the_encoder_that_fits_is_fetched(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are published: two encoders, and some of XL's adapters read the other one."""
    there = cached(tmp_path, "someone", "ip")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for folder, hidden in {"models": HIDDEN, "sdxl_models": 20}.items():
        save_encoder(there / folder / "image_encoder", hidden=hidden)
    shutil.copy(root / "ip" / "1-plus.safetensors", there / "sdxl_models" / "plus.safetensors")
    shutil.copy(root / "ip" / "1.safetensors", there / "models" / "plain.safetensors")
    model, local = (TextToImage.from_pretrained(root / "1", device="cpu") for _ in range(2))
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": 2, "output_type": "latent"}
    for name, file in {"sdxl_models/plus": "1-plus", "models/plain": "1"}.items():
        model.load_ip_adapter(f"someone/ip/{name}.safetensors")
        local.load_ip_adapter(root / "ip" / f"{file}.safetensors")
        shown = [each(SHORT, ip_adapter_image=picture(), **asked).images for each in (model, local)]
        assert torch.equal(*shown)
    # with a network, its weights are asked for by name
    listed = [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]
    fetched: list[list[str]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(there)

    monkeypatch.setattr(hub, "list_repo_files", lambda repository: [*listed, "models/image_encoder/pytorch_model.bin"])
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    model.load_ip_adapter("someone/ip/sdxl_models/plus.safetensors")
    encoder = [f"models/image_encoder/{name}" for name in ("config.json", "model.safetensors")]
    assert fetched == [["sdxl_models/plus.safetensors", "*image_encoder/*.json"], encoder]


def test_two_prompts_and_their_pictures(root: Path, model: TextToImage) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": SEED}
    both = model(PROMPTS, ip_adapter_image=[picture(1), picture(2)], **asked).images
    one = [model(text, ip_adapter_image=picture(k + 1), **asked).images for k, text in enumerate(PROMPTS)]
    assert apart(both, torch.cat(one)) < 1e-5
    same = model(PROMPTS, ip_adapter_image=picture(1), **asked).images
    assert apart(same[:1], one[0]) < 1e-5 and apart(same[1:], one[1]) > 1e-2
    embeds = model.embed_ip_adapter_image([picture(1), picture(2)])
    assert apart(model(PROMPTS, ip_adapter_image_embeds=embeds, **asked).images, both) < 1e-5


def test_requests_with_and_without_a_picture_share_a_batch(root: Path, model: TextToImage) -> None:
    """Without one the picture is the plain model's, alone and beside others that have one."""
    plain = TextToImage.from_pretrained(root / "1", device="cpu")
    asked: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": SEED}
    embeds = model.embed_ip_adapter_image(picture())
    requests = [
        Request(prompt=SHORT, **asked, num_images_per_prompt=2),
        Request(prompt=SHORT, **asked, ip_adapter_image_embeds=embeds),
        Request(prompt=LONG, **asked, ip_adapter_image_embeds=embeds, guidance_scale=1.0),
    ]
    together = [result.images for result in model.paint(requests)]
    for request, images in zip(requests, together, strict=True):
        assert apart(model.paint([request])[0].images, images) < 1e-5
    assert apart(plain.paint(requests[:1])[0].images, together[0]) < 1e-5
    assert apart(together[1], together[0][:1]) > 1e-2
    alone = plain.paint(requests[:1])[0].images
    assert torch.equal(model.paint(requests[:1])[0].images, alone)


def test_scale_and_the_image_itself_show(root: Path, model: TextToImage) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": SEED}
    shown = model(SHORT, ip_adapter_image=picture(), **asked).images
    assert apart(model(SHORT, ip_adapter_image=picture(1), **asked).images, shown) > 1e-2
    off = TextToImage.from_pretrained(root / "1", device="cpu")
    off.load_ip_adapter(root / "ip" / "1.safetensors", 2.0)
    off.load_ip_adapter(root / "ip" / "1.safetensors", 0.0)  # in its place
    assert [each.scale for each in off.adapters] == [0.0]
    assert apart(off(SHORT, ip_adapter_image=picture(), **asked).images, model(SHORT, **asked).images) < 1e-5


def test_the_command_line_and_its_record(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "shown.png")
    arguments = ["generate", SHORT, "-n", "1", "--steps", "2", "--model", str(root / "1"), "--quiet"]
    adapter = ["--ip-adapter", f"{root / 'ip' / '1.safetensors'}:{SCALE}"]
    shown = ["--ip-image", str(tmp_path / "shown.png")]
    assert command.main([*arguments, *adapter, *shown, "--out", str(tmp_path / "out")]) == 0
    painted = Path(capsys.readouterr().out.strip())
    (tmp_path / "shown.png").unlink()  # the record has its embedding
    assert command.main(["reproduce", str(painted), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] <= 1
    for half in (adapter, shown):
        assert command.main([*arguments, *half, "--out", str(tmp_path / "none")]) == 2
        assert "--ip-adapter and --ip-image go together" in capsys.readouterr().err
    model = TextToImage.from_pretrained(root / "1", device="cpu")
    record = read_png(painted)[1]
    model.load_again(record)
    for damaged in ("!", "AAA=", 3):
        with pytest.raises(ValueError, match="its ip_adapter_image_embeds is no embedding"):
            model.repaint(record | {"ip_adapter_image_embeds": damaged})
    with pytest.raises(ValueError, match=r"an IP-Adapter of shape \(1,\); this model takes \(12,\)"):
        model.repaint(record | {"ip_adapter_image_embeds": "AAAAAA=="})


def test_what_does_not_fit_is_said(root: Path, model: TextToImage, tmp_path: Path) -> None:
    weights = load_file(root / "ip" / "1.safetensors")
    path = tmp_path / "a.safetensors"
    fresh = TextToImage.from_pretrained(root / "1", device="cpu")

    def refused(message: str, change: dict[str, Tensor | None]) -> None:
        save_file({key: value for key, value in (weights | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=message) as error:
            fresh.load_ip_adapter(path)
        assert "\n" not in str(error.value)

    key = "ip_adapter.1.to_k_ip.weight"
    face = {"image_proj.proj.weight": None, "image_proj.proj.0.weight": torch.zeros(16, 16)}
    refused(r"is of no kind that is read \(plain, Plus, Full Face\); FaceID is not", face)
    refused(r"is damaged: its image_proj\.\* .*norm\.weight", {"image_proj.norm.weight": None})
    refused(r"is damaged: its image_proj\.\* .*shape", {"image_proj.norm.weight": torch.zeros(3)})
    half = {"image_proj.proj.weight": None, "image_proj.latents": torch.zeros(1, 16, 16)}
    refused(r"is damaged: its image_proj\.\* do not fit each other \('proj.*\.weight'\)", half)
    wide = {"proj.weight": torch.zeros(4 * 10, E), "proj.bias": torch.zeros(4 * 10)}
    wide |= {"norm.weight": torch.zeros(10), "norm.bias": torch.zeros(10)}
    refused(r"its tokens are 10 wide, the UNet's", {f"image_proj.{key}": value for key, value in wide.items()})
    refused(f"is of another base model: weight {key} is missing", {key: None})
    refused("weight ip_adapter.99.to_k_ip.weight is of no layer here", {"ip_adapter.99.to_k_ip.weight": torch.zeros(2)})
    refused(f"weight {key} is of another shape here", {key: torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="is of another base model"):
        fresh.load_ip_adapter(root / "ip" / "xl.safetensors")
    with pytest.raises(ValueError, match="has no IP-Adapter"):
        fresh(SHORT, ip_adapter_image=picture())
    with pytest.raises(ValueError, match="has no IP-Adapter"):
        fresh(SHORT, ip_adapter_image_embeds=torch.zeros(1, E))
    save_file(weights, path)
    fresh.load_ip_adapter(path)  # no encoder lies beside it
    with pytest.raises(ValueError, match="has no image encoder; load it with image_encoder=FOLDER"):
        fresh(SHORT, ip_adapter_image=picture())
    fresh.load_ip_adapter(path, image_encoder=root / "ip" / "image_encoder")
    with pytest.raises(ValueError, match=r"picture cat\.png does not exist"):
        fresh(SHORT, ip_adapter_image="cat.png")
    with pytest.raises(ValueError, match="ip_adapter_image has 0 pictures for 1 prompt;"):
        fresh(SHORT, ip_adapter_image=[])
    with pytest.raises(ValueError, match="ip_adapter_image is empty; give at least one picture"):
        fresh.embed_ip_adapter_image([])
    embeds = fresh.embed_ip_adapter_image(picture())
    torch.testing.assert_close(embeds, model.embed_ip_adapter_image(picture()))
    with pytest.raises(ValueError, match=r"ip_adapter_image_embeds has shape \(1, 12\); give \(2, 12\)"):
        fresh(PROMPTS, ip_adapter_image_embeds=embeds)
    with pytest.raises(ValueError, match="were both given"):
        fresh(SHORT, ip_adapter_image=picture(), ip_adapter_image_embeds=embeds)
    with pytest.raises(ValueError, match=r"^image_encoder: folder '.*nowhere' does not exist"):
        fresh.load_ip_adapter(path, image_encoder=tmp_path / "nowhere")
    plus = tmp_path / "plus.safetensors"
    shutil.copy(root / "ip" / "1-plus.safetensors", plus)
    with pytest.raises(ValueError, match=r"is of the kind Plus, which reads the states .* give image_encoder=FOLDER"):
        fresh.load_ip_adapter(plus)
    save_encoder(tmp_path / "wide", hidden=20)
    with pytest.raises(
        ValueError, match="takes states of width 16, not 20 of its image encoder; give another with image_encoder="
    ):
        fresh.load_ip_adapter(plus, image_encoder=tmp_path / "wide")
