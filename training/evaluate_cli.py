"""The verb `evaluate`: measures a model on the committed test prompts.

Owns options and what is printed; what is measured is `evaluation`'s. Standard output carries the result (with
--json one object and nothing else), standard error everything about it. Heavy libraries are imported when the
verb runs.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_OUT = Path("runs/evaluate")


def evaluate(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="Bundled name, diffusers folder or hub id.")
    ] = "shapes64",
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
    from training.evaluation.measure import measure
    from training.evaluation.tables import fault_table, table

    result = measure(
        model,
        out,
        number=number,
        modes=("prior", "no_prior") if prior is None else ("prior",) if prior else ("no_prior",),
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        device=device,
        quiet=quiet,
    )
    if as_json:
        print(json.dumps(result))
        return
    print(f"{table(result)}\n\n{fault_table(result)}")
    print(f"\n{result['seconds']:.0f} s of painting; {out / 'result.json'}", file=sys.stderr)
