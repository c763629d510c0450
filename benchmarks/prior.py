"""Seconds of the prior's whole sampling loop: diffusers' PriorTransformer at every step, and ours beside it.

    python benchmarks/prior.py [--candidates 1 --candidates 4 --candidates 16] [--steps N] [--layers 20] ...

A random prior of DALL-E 2's shape samples image embeddings for random texts, guided as StableUnCLIPPipeline guides it.
Both loops start from the same noise; they take turns within each repeat, and what they end with is compared. Left
out, the sizes are those of a 1 B prior on CUDA and a quarter of it on the CPU. The result is kept in
benchmarks/results/prior.json.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, PriorTransformer
from torch import Tensor

from gauges import now
from gen.bucket import Buckets
from gen.conditioning import Condition
from gen.prior import STAGE
from gen.prior_prefix import CachedPrior
from gen.row import Row
from gen.rows import Rows
from gen.runtime import DTYPES
from gen.scheduler import NoiseLevels
from options import known
from report import RESULTS, markdown, save, spread
from samplers.noise import noise
from training.provenance import provenance


@dataclass(frozen=True)
class Sizes:
    """What is sampled, by which prior."""

    layers: int
    heads: int
    head_width: int
    embedding_width: int
    text_tokens: int
    prompts: int
    steps: int
    guidance_scale: float
    dtype: str


def made(sizes: Sizes, device: torch.device) -> PriorTransformer:
    """A random prior whose positions and query are as large as its other weights."""
    torch.manual_seed(0)
    network = PriorTransformer(
        num_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_width,
        embedding_dim=sizes.embedding_width,
        num_embeddings=sizes.text_tokens,
    )
    with torch.no_grad():
        for weight in (network.positional_embedding, network.prd_embedding):
            weight.normal_()
    return network.eval().to(device, DTYPES[sizes.dtype])


def texts(sizes: Sizes, network: PriorTransformer) -> list[Condition]:
    """What the prior is told: an empty text, then prompts of lengths from a quarter of all tokens to all."""
    rng = torch.Generator().manual_seed(1)
    lengths = [2, *torch.linspace(sizes.text_tokens // 4, sizes.text_tokens, sizes.prompts).round().int().tolist()]
    conditions = []
    for length in lengths:
        tokens = torch.randn(sizes.text_tokens, sizes.embedding_width, generator=rng)
        vector = torch.randn(sizes.embedding_width, generator=rng)
        mask = torch.arange(sizes.text_tokens) < length
        placed = (each.to(network.device, network.dtype) for each in (tokens, vector))
        conditions.append(Condition(*placed, mask.to(network.device)))
    return conditions


def stock(
    network: PriorTransformer, conditions: list[Condition], candidates: int, sizes: Sizes, levels: NoiseLevels
) -> Tensor:
    """As StableUnCLIPPipeline runs its prior: every candidate brings its text and the empty one to every step."""
    prompts = [prompt for prompt in conditions[1:] for _ in range(candidates)]
    rows = [conditions[0]] * len(prompts) + prompts
    kinds = ("encoder_hidden_states", "pooled_projections", "attention_mask")
    tokens, vector, mask = (torch.stack([getattr(one, kind) for one in rows]) for kind in kinds)
    scheduler = DDIMScheduler.from_config(levels.stock.config)
    scheduler.set_timesteps(sizes.steps)
    x = start(candidates, sizes).to(network.device)
    for t in scheduler.timesteps.to(network.device):
        answer = network(
            torch.cat([x, x]).to(network.dtype),
            timestep=t,
            proj_embedding=vector,
            encoder_hidden_states=tokens,
            attention_mask=mask,
        ).predicted_image_embedding
        null, prompt = answer.float().chunk(2)
        x = scheduler.step(null + sizes.guidance_scale * (prompt - null), t, x).prev_sample
    return x


def ours(
    network: PriorTransformer,
    conditions: list[Condition],
    candidates: int,
    sizes: Sizes,
    levels: NoiseLevels,
    buckets: Buckets,  # what a model has measured of its calls in its life
) -> Tensor:
    """The same embeddings as rows, each text's prefix read within the time taken."""
    schedule, shape = levels.schedule(levels.sampler, sizes.steps), (sizes.embedding_width,)
    rows = [
        Row(
            key=key,
            seed=key % candidates,
            shape=shape,
            schedule=schedule,
            sampler=levels.sampler,
            prompt=conditions[1 + key // candidates],
            null=conditions[0],
            guidance_scale=sizes.guidance_scale,
        )
        for key in range(sizes.prompts * candidates)
    ]
    together = Rows(CachedPrior(network), levels.scaling, STAGE, network.device, buckets)
    found = {one.row.key: one.x for finished in together.run(rows) for one in finished}
    return torch.stack([found[row.key] for row in rows])


def start(candidates: int, sizes: Sizes) -> Tensor:
    """The noise that the engine's rows draw: every prompt begins again at seed 0."""
    return noise([*range(candidates)] * sizes.prompts, STAGE, 0, (sizes.embedding_width,))


def compare(network: PriorTransformer, candidates: int, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Seconds of both loops in turns, and how far what they end with is apart."""
    conditions = texts(sizes, network)
    levels = NoiseLevels.of(
        DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample=False), ""
    )
    seconds: dict[str, list[float]] = {"diffusers": [], "unclip": []}
    ends: dict[str, Tensor] = {}
    loops: dict[str, Callable[..., Tensor]] = {"diffusers": stock, "unclip": partial(ours, buckets=Buckets())}
    for repeat in range(repeats + 1):
        for name, loop in loops.items():
            began = now(network.device)
            ends[name] = loop(network, conditions, candidates, sizes, levels)
            if repeat:  # the first warms up
                seconds[name].append(now(network.device) - began)
    apart = (ends["diffusers"] - ends["unclip"]).abs().max().item()
    return {
        "candidates": candidates,
        "seconds": seconds,
        "speed_up": median(seconds["diffusers"]) / median(seconds["unclip"]),
        "max_difference": apart,
        "largest": ends["diffusers"].abs().max().item(),
    }


@torch.no_grad()
def main(
    candidates: Annotated[list[int] | None, typer.Option(min=1, help="Per prompt; 1, 4 and 16 when not given.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Texts sampled at once.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="25 on CUDA, 10 on the CPU.")] = None,
    guidance_scale: Annotated[float, typer.Option(min=1.01, help="Both loops guide.")] = 4.0,
    layers: Annotated[int, typer.Option(min=1)] = 20,
    heads: Annotated[int | None, typer.Option(min=1, help="32 on CUDA (1 B parameters), 16 on the CPU.")] = None,
    head_width: Annotated[int, typer.Option(min=1)] = 64,
    embedding_width: Annotated[int, typer.Option(min=1)] = 768,
    text_tokens: Annotated[int, typer.Option(min=4)] = 77,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; float32 on the CPU, else float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda where there is one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns of each loop.")] = 5,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "prior.json",
) -> None:
    """Measure the prior."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fast = place.type == "cuda"
    sizes = Sizes(
        layers=layers,
        heads=heads or (32 if fast else 16),
        head_width=head_width,
        embedding_width=embedding_width,
        text_tokens=text_tokens,
        prompts=prompts,
        steps=steps or (25 if fast else 10),
        guidance_scale=guidance_scale,
        dtype=known(dtype or ("float16" if fast else "float32"), DTYPES, "dtype"),
    )
    network = made(sizes, place)
    parameters = sum(weight.numel() for weight in network.parameters())
    measured = [compare(network, number, sizes, repeats) for number in candidates or [1, 4, 16]]
    found = {"parameters": parameters, "sizes": asdict(sizes), "measured": measured, **provenance(place)}
    save(found, result)
    described = f"{parameters / 1e6:.0f} M parameters, {sizes.dtype}, {text_tokens} text tokens"
    print(f"{described}, {sizes.steps} steps, {prompts} prompt(s), guidance {guidance_scale}, {place.type}\n")
    rows = []
    for one in measured:
        seconds = [spread(each) for each in one["seconds"].values()]
        apart = f"{one['max_difference']:.1e} ({one['largest']:.1f})"
        rows.append([str(one["candidates"]), *seconds, f"{one['speed_up']:.1f}", apart])
    columns = ["candidates", "diffusers, s, median (range)", "unclip, s", "speed-up", "largest difference (of)"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    typer.run(main)
