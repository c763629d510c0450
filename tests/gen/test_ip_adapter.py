"""Pictures beside the text: stock diffusers' IP-Adapter on tiny weights, batches of all kinds, records, other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gen import Request, TextToImage, command
from gen.attention import attentions
from gen.picture import read_png
from tests.stock import LONG, PROMPTS, SEED, SHORT, apart, assert_same, stock_of
from tests.tiny import make_tiny_stable_diffusion, make_tiny_stable_diffusion_xl

E, TOKENS, SCALE = 12, 4, 0.6
STOCK = {"1": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


def adapter_of(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """A tiny adapter of a model's UNet, as published files name it: self-attentions are counted and have nothing."""
    rng = torch.Generator().manual_seed(seed)
    unet = TextToImage.from_pretrained(folder, device="cpu").model.unet
    width = unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng) * 0.5

    told = {"proj.weight": random(TOKENS * width, E), "proj.bias": random(TOKENS * width)}
    told |= {"norm.weight": random(width) + 1, "norm.bias": random(width)}
    weights = {f"image_proj.{name}": tensor for name, tensor in told.items()}
    for place, layer in enumerate(attentions(unet)):
        if layer.is_cross_attention:
            for kind in "kv":
                weights[f"ip_adapter.{place}.to_{kind}_ip.weight"] = random(layer.inner_dim, width)
    return weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `1` and `xl`, and a folder `ip` with an adapter of each and the image encoder beside them."""
    root = tmp_path_factory.mktemp("ip")
    make_tiny_stable_diffusion(root / "1")
    make_tiny_stable_diffusion_xl(root / "xl")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPVisionConfig(**vision, image_size=32, patch_size=8, projection_dim=E, initializer_factor=5.0)
        CLIPVisionModelWithProjection(config).save_pretrained(root / "ip" / "image_encoder")
    for kind in STOCK:
        save_file(adapter_of(root / kind), root / "ip" / f"{kind}.safetensors")
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> TextToImage:
    model = TextToImage.from_pretrained(root / "1", device="cpu")
    model.load_ip_adapter(root / "ip" / "1.safetensors", SCALE)
    return model


def picture(seed: int = 0) -> Image.Image:
    """Of the encoder's own size, where no resize of transformers' can differ by a level."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.mark.parametrize("kind", ["1", "xl"])
def test_stock_paints_the_same(root: Path, kind: str) -> None:
    model = TextToImage.from_pretrained(root / kind, device="cpu")
    model.load_ip_adapter(root / "ip" / f"{kind}.safetensors", SCALE)
    stock = stock_of(STOCK[kind], root / kind)
    stock.load_ip_adapter(str(root / "ip"), subfolder="", weight_name=f"{kind}.safetensors")
    stock.set_ip_adapter_scale(SCALE)
    for guided in ({"guidance_scale": 1.0}, {"guidance_scale": 5.0, "negative_prompt": ["blue"]}):
        asked: dict[str, Any] = {"num_inference_steps": 4, "ip_adapter_image": picture(), **guided}
        assert_same(model, stock, [SHORT], 2, **asked)


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
    with pytest.raises(ValueError, match="an IP-Adapter of width 1; this model takes 12"):
        model.repaint(record | {"ip_adapter_image_embeds": "AAAAAA=="})


def test_what_does_not_fit_is_said(root: Path, model: TextToImage, tmp_path: Path) -> None:
    weights = load_file(root / "ip" / "1.safetensors")
    path = tmp_path / "a.safetensors"
    fresh = TextToImage.from_pretrained(root / "1", device="cpu")

    def refused(told: str, change: dict[str, Tensor | None]) -> None:
        save_file({key: value for key, value in (weights | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=told) as error:
            fresh.load_ip_adapter(path)
        assert "\n" not in str(error.value)

    key = "ip_adapter.1.to_k_ip.weight"
    plus = {"image_proj.proj.weight": None, "image_proj.latents": torch.zeros(1, 16, 16)}
    refused("is not of the plain kind .*: weight image_proj.proj.weight is missing", plus)
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
    for none in ("cat.png", []):
        with pytest.raises(ValueError, match="ip_adapter_image is no Pillow picture; give one"):
            fresh(SHORT, ip_adapter_image=none)
    embeds = fresh.embed_ip_adapter_image(picture())
    torch.testing.assert_close(embeds, model.embed_ip_adapter_image(picture()))
    with pytest.raises(ValueError, match=r"ip_adapter_image_embeds has shape \(1, 12\); give \(2, 12\)"):
        fresh(PROMPTS, ip_adapter_image_embeds=embeds)
    with pytest.raises(ValueError, match="were both given"):
        fresh(SHORT, ip_adapter_image=picture(), ip_adapter_image_embeds=embeds)
    with pytest.raises(ValueError, match=r"model part .*nowhere' is missing"):
        fresh.load_ip_adapter(path, image_encoder=tmp_path / "nowhere")
