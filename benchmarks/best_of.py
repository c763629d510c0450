"""Seconds for the best k of N candidates: diffusers with transformers, as documented and tuned, and ours beside them.

    python benchmarks/best_of.py [--workload shapes64 ...] [--way unclip ...] [--dtype float32 ...] [--profile]

Every contestant paints the same candidates (weights, noise, steps, guidance), ranks them by the same CLIP and has the
best at the end. Each lives in a process of its own, so that its memory is its own, and they take turns: A B C A B C.
What comes before the first counted turn (loading, the search for the best batch size, compilation, a first call) is
not in the seconds. All are in memory at once; where that is too much, name fewer ways or precisions.

Beside the speed stands how far the final latents are from those of stock diffusers in float32, and whether the same
candidates are kept. In float32 ours must be as good as equal, and in a lower precision as near as stock in the same
one; where it is not, the command ends with status 1, after the result is kept in benchmarks/results/best_of.json.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from contest.comparison import contest
from contest.tables import profile_table, table
from contest.tasks import SEED, USUAL, WORKLOADS, task_of
from contest.ways import WAYS, entrants_of
from contest.workers import quiet
from gen.runtime import DTYPES
from options import PROMPT, chosen, known
from report import RESULTS, save
from training.provenance import provenance


def main(
    sizes: Annotated[str, typer.Option(help=f"Which workloads where none is named: {', '.join(USUAL)}.")] = "real",
    workload: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(WORKLOADS)}.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"From: {', '.join(WAYS)}; all when not given.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 and bfloat16 on the CPU, bfloat16 on CUDA.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns of each contestant.")] = 5,
    number: Annotated[int | None, typer.Option("-n", min=1, help="Candidates, in place of the workload's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the workload's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes and the roof.")] = False,
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "best_of.json",
) -> None:
    """Measure best-of-N."""
    quiet()
    sizes, device = known(sizes, USUAL, "sizes"), known(device, ["cpu", "cuda"], "device")
    names = chosen(workload or USUAL[sizes][device], WORKLOADS, "workload")
    usual = ["float32", "bfloat16"] if device == "cpu" else ["bfloat16"]
    dtypes = chosen(dtype or usual, DTYPES, "dtype")
    entrants = entrants_of(chosen(way, WAYS, "way"), dtypes, device)
    found: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "workloads": {}, **provenance(device)}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            asked = WORKLOADS[name]
            asked = replace(asked, number=number or asked.number, steps=steps or asked.steps)
            task, described = task_of(asked, Path(folder), device)
            outcome = contest(task, entrants, repeats, profile)
        found["workloads"][name] = described | outcome
        save(found, result)
        print(f"\n{name}: best {task.keep} of {task.number}, {task.steps} steps, guidance {task.guidance_scale}\n")
        print(table(outcome["rows"]))
        if profile:
            print(f"\n{profile_table(outcome['profile'])}")
    wrong = [f"{name}: {fault}" for name, one in found["workloads"].items() for fault in one["faults"]]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    typer.run(main)
