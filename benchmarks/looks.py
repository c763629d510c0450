"""What an early look at a candidate says of its end: where the searches' defaults come from.

    python benchmarks/looks.py [--prompts 24] [--candidates 32] [--model shapes64] [--runtime openvino] ...

Candidates of captions that are in no test are painted to their end and ranked. Beside that stand looks that cost
less: the estimate of the clean picture after some of the steps, and whole drafts in few steps from the same noise,
guided at every step or at all but the first and the last, or by the model's own network for drafts, if it has one.
Each look is scored by CLIP as a search scores it. Of each stands how much it costs, in evaluations of the network;
the rank correlation of its scores with those of the end (Spearman, mean over prompts); and what is lost by painting
only its best few: the score of the best one, and the mean of the best four of the first half, below those that all
candidates give. The result is kept in benchmarks/results/looks.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr

from gen import TextToImage
from gen.drafter import SAMPLER
from gen.flight import Step
from gen.search.rules import steps_of
from gen.stages import inner_levels
from report import RESULTS, markdown, save
from training.data.shapes import scene
from training.provenance import provenance

SEEDS = 900_000  # of scenes that nobody trains or tests with, from here on
ESTIMATES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the steps
DRAFTS = (0.2, 0.25, 0.3, 0.35, 0.4)
FEW = {"best": (1, 2, 3, 4), "best four": (4, 5, 6, 8)}


@dataclass(frozen=True)
class Look:
    """A way to look at candidates."""

    name: str
    evaluations: int  # of the network, for a candidate


def captions(number: int) -> list[str]:
    """Of as many scenes with one object, with two and with several of a kind."""

    def of(kind: int) -> Iterator[str]:
        for seed in range(SEEDS, SEEDS + 10_000):
            claim = scene(seed).claim
            if kind == (1 if claim.second is not None else 2 if claim.count > 1 else 0):
                yield claim.text()

    return [text for kind in range(3) for text in islice(of(kind), number // 3)]


def looks_at(model: TextToImage, prompt: str, seed: int, number: int) -> dict[Look | None, list[float]]:
    """Scores of every candidate by each look, in drawing order; None: painted to its end."""
    steps = model.model.abilities.defaults.num_inference_steps
    clip = model.model.clip
    assert clip is not None, "it ranks"
    taken = {steps_of(share, steps) for share in ESTIMATES}
    found: dict[Look | None, dict[int, float]] = {}

    def estimate(step: Step) -> None:
        done = steps - step.steps_left[0]
        if step.stage == "decoder" and done in taken:
            scores = clip.score(model.model.decode(step.x0), prompt).tolist()
            look = Look(f"estimate after {done} steps", 2 * done)
            found.setdefault(look, {}).update(zip(step.seeds, scores, strict=True))

    asked: dict[str, Any] = {"num_images_per_prompt": number, "seed": seed, "output_type": "pt"}

    def painted(**more: Any) -> dict[int, float]:
        result = model(prompt, **asked, **more)
        assert result.scores is not None, "it is ranked"
        return dict(zip(result.seeds, result.scores, strict=True))

    found[None] = painted(callback=estimate)
    for few in sorted({steps_of(share, steps) for share in DRAFTS}):
        found[Look(f"draft in {few} steps", 2 * few)] = painted(num_inference_steps=few)
        levels = model.model.levels
        inside = inner_levels(levels.schedule(levels.sampler, few))
        if inside is not None:
            look = Look(f"draft in {few} steps, the first and the last not guided", 2 * few - 2)
            found[look] = painted(num_inference_steps=few, guidance_interval=inside)
    drafter = model.model.drafter
    if drafter is not None:
        few, alone = drafter.num_inference_steps, TextToImage(replace(model.model, unet=drafter.unet, drafter=None))
        result = alone(prompt, **asked, num_inference_steps=few, guidance_scale=1.0, sampler=SAMPLER)
        assert result.scores is not None, "it is ranked"
        found[Look("draft by its own network", few)] = dict(zip(result.seeds, result.scores, strict=True))
    return {look: [score for _, score in sorted(scores.items())] for look, scores in found.items()}


def lost(looks: np.ndarray, ends: np.ndarray, few: int, keep: int) -> float:
    """By how much the best so many are worse where only the few are painted that look best."""
    chosen = np.argsort(-looks, kind="stable")[:few]
    return float(np.sort(ends)[::-1][:keep].mean() - np.sort(ends[chosen])[::-1][:keep].mean())


def measure(found: list[dict[Look | None, list[float]]]) -> dict[Look, dict[str, Any]]:
    """What each look says, over all prompts."""
    measured: dict[Look, dict[str, Any]] = {}
    for look in found[0]:
        if look is None:
            continue
        pairs = [(np.array(one[look]), np.array(one[None])) for one in found]
        half = len(found[0][None]) // 2
        measured[look] = {
            "evaluations": look.evaluations,
            "rank_correlation": mean(float(spearmanr(looks, ends).statistic) for looks, ends in pairs),
            "best": {few: mean(lost(looks, ends, few, 1) for looks, ends in pairs) for few in FEW["best"]},
            "best four": {
                few: mean(lost(looks[:half], ends[:half], few, 4) for looks, ends in pairs) for few in FEW["best four"]
            },
        }
    return measured


def main(
    prompts: Annotated[int, typer.Option(min=3, help="Captions, a third of each kind.")] = 24,
    candidates: Annotated[int, typer.Option(min=16, help="Of each caption.")] = 32,
    model: Annotated[str, typer.Option(help="Bundled name, diffusers folder or hub id.")] = "shapes64",
    draft_unet: Annotated[Path | None, typer.Option(help="Folder of a UNet for drafts, if the model has none.")] = None,
    runtime: Annotated[str, typer.Option(help="torch or openvino.")] = "torch",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "looks.json",
) -> None:
    """Measure looks."""
    painter = TextToImage.from_pretrained(model, runtime=runtime, dtype=dtype, draft_unet=draft_unet)
    texts = captions(prompts)
    found = [looks_at(painter, text, 1000 * index, candidates) for index, text in enumerate(texts)]
    measured = measure(found)
    settings: dict[str, Any] = {"model": model, "runtime": runtime, "dtype": dtype}
    settings |= {"prompts": len(texts), "candidates": candidates}
    save(
        {**settings, "looks": {look.name: each for look, each in measured.items()}, **provenance(painter.model.device)},
        result,
    )
    print(f"{len(texts)} captions, {candidates} candidates each\n")
    rows = []
    for look, each in measured.items():
        losses = [" / ".join(f"{each[name][few]:.4f}" for few in FEW[name]) for name in FEW]
        rows.append([look.name, str(look.evaluations), f"{each['rank_correlation']:.2f}", *losses])
    columns = ["look", "evaluations", "rank correlation"]
    columns += [f"{name}: lost by painting {', '.join(map(str, few))}" for name, few in FEW.items()]
    print(markdown(columns, rows))


if __name__ == "__main__":
    typer.run(main)
