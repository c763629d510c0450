"""Equal top score in less time: searches beside exact best-of-N, the same model, prompts and seeds, in turns.

    python benchmarks/search.py [--task one-of-32 ...] [--way draft ...] [--prompts 60] [--together 1] ...

The ways take turns: each paints a prompt, or several `together` in one call, before the next come, and keeps the same
number of pictures of each. Alone, what a search leaves of a prompt fills no batch, and small batches are slow; together
the places of what one prompt drops are taken by another's.
A way may draw more candidates than best-of-N does (`x1.5`: half as many more): what it saves it may spend. Beside the
seconds, of all a call does, stand the paired differences to exact best-of-N over prompts: of the mean score of the
pictures kept, and the ratio of the seconds, each with a 95 % interval (bootstrap over prompts, and over calls for the
seconds). "Not worse" says that the interval of the score reaches zero or lies above it, which few prompts make easy; so
read the interval.

Drafts are painted by the model's own network for them, if it has one or is given one (`--draft-unet`, of `unclip train
draft`); those of a "decoder's draft" by the decoder all the same.

Prompts are the committed test prompts, spread evenly over the file; rungs and shares were chosen on other ones
(`benchmarks/looks.py`). The result is kept in benchmarks/results/search.json.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, TypeVar

import typer

from gauges import now
from gen import TextToImage
from gen.search import BestOf, Draft, Halving, Racing, Search
from gen.search.rules import DRAFTED
from options import chosen
from report import RESULTS, markdown, save
from training.data.suite import Prompt, load
from training.provenance import provenance

DRAWS = 2000  # of the bootstrap

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """Candidates of exact best-of-N, and how many of them are kept."""

    number: int
    keep: int


@dataclass(frozen=True)
class Way:
    """A search, and how many times as many candidates it draws."""

    search: Search
    draws: float = 1.0


TASKS = {"one-of-32": Task(32, 1), "four-of-16": Task(16, 4)}
EXACT = "best_of"
WAYS = {
    EXACT: Way(BestOf()),
    "halving": Way(Halving()),
    "halving x1.5": Way(Halving(), 1.5),
    "draft": Way(Draft()),
    "draft x1.2": Way(Draft(), 1.2),
    "draft x1.5": Way(Draft(), 1.5),
    "draft x2": Way(Draft(), 2.0),
    "decoder's draft x1.2": Way(Draft(steps=DRAFTED), 1.2),
    "decoder's draft, finer": Way(Draft(steps=0.4)),
    "racing": Way(Racing()),
}


@dataclass(frozen=True)
class Turn:
    """What a way made of a prompt."""

    seconds: float
    score: float  # mean of those kept
    decoder_evaluations: float
    decodes: float
    previews: float
    scores: float


def parts_of(things: Sequence[T], size: int) -> list[Sequence[T]]:
    """All of them in their order, so many at a time; the last may be fewer."""
    return [things[start : start + size] for start in range(0, len(things), size)]


def turns_of(model: TextToImage, prompts: Sequence[Prompt], repeat: int, task: Task, way: Way) -> list[Turn]:
    """Paint some prompts in one way, in one call; of its seconds and its work each has an equal share."""
    began = now(model.model.device)
    result = model(
        [prompt.text for prompt in prompts],
        num_images_per_prompt=round(task.number * way.draws),
        keep=task.keep,
        seed=[prompt.seed + 1000 * repeat for prompt in prompts],
        search=way.search,
        output_type="pt",
    )
    seconds = now(model.model.device) - began
    taken, number = result.account, len(prompts)
    assert result.scores is not None, "it is ranked"
    counts = taken.evaluations["decoder"], taken.decodes, taken.previews, taken.scores
    shares = [seconds / number, *(count / number for count in counts)]
    scores = [mean(kept) for kept in parts_of(result.scores, task.keep)]
    return [Turn(shares[0], score, *shares[1:]) for score in scores]


def beside(turns: Sequence[Turn], exact: Sequence[Turn], together: int = 1) -> dict[str, Any]:
    """Of a way against the exact one, prompt by prompt: difference of scores, ratio of seconds, with intervals."""
    rng = random.Random(0)
    pairs = list(zip(turns, exact, strict=True))
    drawn = [rng.choices(pairs, k=len(pairs)) for _ in range(DRAWS)]
    differences = sorted(mean(ours.score - theirs.score for ours, theirs in each) for each in drawn)
    calls = parts_of(pairs, together)  # whose prompts share its seconds
    ratios = sorted(faster([pair for call in rng.choices(calls, k=len(calls)) for pair in call]) for _ in range(DRAWS))
    low, high = round(0.025 * DRAWS), round(0.975 * DRAWS) - 1
    return {
        "score_difference": mean(ours.score - theirs.score for ours, theirs in pairs),
        "score_interval": [differences[low], differences[high]],
        "times_faster": faster(pairs),
        "times_faster_interval": [ratios[low], ratios[high]],
        "not_worse": differences[high] >= 0,
    }


def faster(pairs: Sequence[tuple[Turn, Turn]]) -> float:
    """Seconds of all exact turns over seconds of all others."""
    return sum(theirs.seconds for _, theirs in pairs) / sum(ours.seconds for ours, _ in pairs)


def row(name: str, turns: Sequence[Turn], measured: dict[str, Any]) -> list[str]:
    """A way as a line of the table."""
    low, high = measured["score_interval"]
    slow, fast = measured["times_faster_interval"]
    return [
        name,
        f"{mean(each.seconds for each in turns):.3g}",
        f"{measured['times_faster']:.2f}× ({slow:.2f}–{fast:.2f})",
        f"{mean(each.score for each in turns):.4f}",
        f"{measured['score_difference']:+.4f} ({low:+.4f} to {high:+.4f})",
        "yes" if measured["not_worse"] else "no",
        f"{mean(each.decoder_evaluations for each in turns):.0f}",
        f"{mean(each.decodes for each in turns):.1f}",
    ]


def main(
    task: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(TASKS)}; all when not given.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(WAYS)}; all when not given.")] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts.")] = 60,
    together: Annotated[int, typer.Option(min=1, help="Prompts in one call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times that every prompt is painted, from other seeds.")] = 1,
    model: Annotated[str, typer.Option(help="Bundled name, diffusers folder or hub id.")] = "shapes64",
    draft_unet: Annotated[Path | None, typer.Option(help="Folder of a UNet for drafts, if the model has none.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda where there is one.")] = None,
    runtime: Annotated[str, typer.Option(help="torch or openvino.")] = "torch",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "search.json",
) -> None:
    """Measure searches."""
    tasks, ways = chosen(task, TASKS, "task"), chosen(way, WAYS, "way")
    ways = [EXACT, *(name for name in ways if name != EXACT)]
    painter = TextToImage.from_pretrained(model, device, dtype, runtime=runtime, draft_unet=draft_unet)
    suite = load()
    asked = [suite[index * len(suite) // prompts] for index in range(prompts)]
    drafter = painter.model.drafter
    found: dict[str, Any] = {"model": model, "runtime": runtime, "dtype": dtype}
    found["draft_steps"] = None if drafter is None else drafter.num_inference_steps  # of its own network for drafts
    found |= {"prompts": prompts, "together": together, "repeats": repeats, "tasks": {}}
    for name in tasks:
        for each in ways:  # measures memory, loads what is loaded late
            turns_of(painter, asked[:together], 0, TASKS[name], WAYS[each])
        turns: dict[str, list[Turn]] = {each: [] for each in ways}
        for repeat in range(repeats):
            for some in parts_of(asked, together):
                for each in ways:
                    turns[each] += turns_of(painter, some, repeat, TASKS[name], WAYS[each])
        measured = {each: beside(taken, turns[EXACT], together) for each, taken in turns.items()}
        found["tasks"][name] = {
            **asdict(TASKS[name]),
            "ways": {
                each: {"search": repr(WAYS[each].search), "draws": WAYS[each].draws, **measured[each]}
                | {"turns": [asdict(one) for one in taken]}
                for each, taken in turns.items()
            },
        }
        save({**found, **provenance(painter.model.device)}, result)
        print(f"\n{name}: {len(turns[EXACT])} prompts, {together} together\n")
        columns = ["way", "mean seconds", "times as fast (95 %)", "mean score kept", "to best_of (95 %)", "not worse"]
        columns += ["decoder evaluations", "decodes"]
        print(markdown(columns, [row(each, taken, measured[each]) for each, taken in turns.items()]))


if __name__ == "__main__":
    typer.run(main)
