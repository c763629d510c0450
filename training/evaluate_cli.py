"""The verb `evaluate`: measures a model on the committed test prompts.

Owns options, the bar and what is printed; what is measured is `evaluate.py`'s. Standard output carries the
result (with --json one object and nothing else), standard error everything about it. Heavy libraries are
imported when the verb runs.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

SUITES = ("shapes",)
DEFAULT_OUT = Path("runs/evaluate")


def evaluate(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="Bundled name, diffusers folder or hub id.")
    ] = "shapes64",
    suite: Annotated[str, typer.Option(metavar="NAME", help="Test prompts: shapes.")] = "shapes",
    number: Annotated[int, typer.Option("-n", "--num-images", metavar="N", help="Candidates a prompt.")] = 16,
    prior: Annotated[
        bool | None,
        typer.Option("--prior/--no-prior", help="Through the prior, or from the text alone (default: both)"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Added to every prompt's own seed.")] = 0,
    limit: Annotated[
        int | None, typer.Option(metavar="K", help="Only the first K prompts of each group: a quick look.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Pictures painted together (default: 64, on a GPU 1024)"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda (default: a GPU where there is one)")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where outcomes and pictures are kept; run again to go on.")
    ] = DEFAULT_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Measure what a model paints right, how well its CLIP chooses, and CLIP's retrieval.

    Writes DIR/result.json, every candidate's outcome in DIR/candidates.jsonl, and DIR/strips/MODE/PROMPT.png,
    each prompt's candidates best first. An interrupted evaluation goes on when the same command is given
    again.
    """
    from training.evaluate import fault_table, table

    result = measure(
        model,
        suite,
        number=number,
        modes=("prior", "no_prior") if prior is None else ("prior",) if prior else ("no_prior",),
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        device=device,
        out=out,
        quiet=quiet,
    )
    if as_json:
        print(json.dumps(result))
        return
    print(f"{table(result)}\n\n{fault_table(result)}")
    print(f"\n{result['seconds']:.0f} s of painting; {out / 'result.json'}", file=sys.stderr)


def measure(
    model: str,
    suite: str,
    *,
    number: int = 16,
    modes: tuple[str, ...] = ("prior", "no_prior"),
    seed: int = 0,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    out: Path = DEFAULT_OUT,
    quiet: bool = False,
) -> dict[str, Any]:
    """Load the model, evaluate it under a bar and write `result.json`."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; choose from: {', '.join(SUITES)}")
    for name, value in (("-n", number), ("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gen import TextToImage
    from training import evaluate as evaluation
    from training.data.suite import SHAPES_TEST, load

    prompts = load()
    if limit is not None:
        groups = dict.fromkeys(prompt.group for prompt in prompts)
        some = {group: [prompt for prompt in prompts if prompt.group == group][:limit] for group in groups}
        some["retrieval"] = [prompt for prompt in prompts if prompt.group == "retrieval"]  # cheap, and one number
        prompts = [prompt for each in some.values() for prompt in each]
    painter = TextToImage.from_pretrained(model, device)
    clip = painter.model.clip
    if clip is None:
        raise ValueError(f"model {model!r} has no clip/ to rank with, so there is no best of {number} to measure")
    where = painter.model.device
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(f"prompts x {number}", total=None)
        try:
            result = evaluation.evaluate(
                painter,
                clip,
                prompts,
                out,
                about={
                    "suite": suite,
                    "prompts": evaluation.digest(SHAPES_TEST),
                    "model": painter.name,
                    "model_hash": painter.hash,
                    "settings": painter.model.abilities.defaults.to_json(),
                    "on": where.type,
                },
                modes=modes,
                num_candidates=number,
                seed=seed,
                batch_size=batch_size or (1024 if where.type == "cuda" else 64),
                device=where,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except KeyboardInterrupt:
            bar.console.print(f"what is painted is kept in {out}; the same command goes on from there")
            raise
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
