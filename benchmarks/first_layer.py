"""What it gives that prompt and null are one in a UNet until they read their texts.

    python benchmarks/first_layer.py [--family stable-diffusion-v1-5] [--latent 64 ...] [--dtype float32] [--repeats 5]

A UNet of a published shape with random weights is asked about prompt and null of one picture, with its first attention
computed for both and once, in turns. Beside the seconds stands the attention's share of the operations of a call, half
of which is what can be saved. The result is kept in benchmarks/results/first_layer.json.
"""

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gauges import now
from gen.attention.network import reading, set_attention
from gen.conditioning import Condition, Conditions
from gen.model_folder import ASSETS
from gen.runtime import DTYPES
from options import known
from report import RESULTS, markdown, save, spread
from training.provenance import provenance

CONFIGS = ASSETS / "configs"
FIRST = "UNet2DConditionModel.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LENGTH = 77  # tokens of a text


def unet_of(family: str, device: str) -> UNet2DConditionModel:
    """Of a family's shape."""
    config = UNet2DConditionModel.load_config(CONFIGS / family / "unet")
    with torch.device(device):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config).eval()
    return unet


@torch.no_grad()
def share(family: str, side: int) -> float:
    """Of the operations of a call, that of the first attention."""
    unet = unet_of(family, "meta")
    x, states = torch.empty(1, 4, side, side, device="meta"), torch.empty(1, LENGTH, width_of(unet), device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, depth=6) as counted:
        unet(x, torch.zeros(1, device="meta"), states)
    counts = counted.get_flop_counts()
    return sum(counts[FIRST].values()) / sum(counts["Global"].values())


def width_of(unet: UNet2DConditionModel) -> int:
    """D of the token states that it reads."""
    width: int = unet.config.cross_attention_dim
    return width


@torch.no_grad()
def measure(unet: UNet2DConditionModel, side: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of calls with the first attention computed for both, and once."""
    device, dtype = unet.device, unet.dtype
    x = torch.randn(1, 4, side, side, device=device, dtype=dtype).expand(2, -1, -1, -1)
    null, prompt = (Condition(torch.randn(LENGTH, width_of(unet), device=device, dtype=dtype)) for _ in range(2))
    conditions = Conditions((null, prompt), ("row", "row"))
    read: dict[str, Any] = reading(unet, conditions.distinct_encoder_hidden_states, torch.stack) or {}
    ways = {"for both": read, "once": read | {"alike": conditions.alike}}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, kwargs in ways.items():
            began = now(device)
            unet(
                x,
                torch.full((2,), 500.0, device=device),
                conditions.encoder_hidden_states,
                cross_attention_kwargs=kwargs,
            )
            found[name].append(now(device) - began)
    return {name: seconds[1:] for name, seconds in found.items()}  # the first plans


def main(
    family: Annotated[str, typer.Option(help="A folder of gen/assets/configs.")] = "stable-diffusion-v1-5",
    latent: Annotated[list[int] | None, typer.Option(help="Sides of latents (default: 64 and 96).")] = None,
    dtype: Annotated[str, typer.Option(help=f"From: {', '.join(DTYPES)}.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Counted calls of each.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "first_layer.json",
) -> None:
    """Measure what the first layer's sharing gives."""
    known(family, [folder.name for folder in CONFIGS.iterdir()], "family")
    unet = unet_of(family, device).to(DTYPES[known(dtype, DTYPES, "dtype")])
    set_attention(unet)
    found: dict[str, Any] = {"family": family, "dtype": dtype, "sides": {}}
    lines = []
    for side in latent or [64, 96]:
        seconds, part = measure(unet, side, repeats), share(family, side)
        found["sides"][side] = {"seconds": seconds, "share": part}
        save({**found, **provenance(device)}, result)
        faster = median(seconds["for both"]) / median(seconds["once"])
        lines.append([str(side), *(spread(each) for each in seconds.values()), f"{faster:.3f}×", f"{part:.1%}"])
    print(markdown(["latent", "for both, s", "once, s", "faster", "share of operations"], lines))


if __name__ == "__main__":
    typer.run(main)
