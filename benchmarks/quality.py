"""What a model reaches on the committed test prompts, kept in benchmarks/results/quality.json.

    python benchmarks/quality.py      # the bundled model, every prompt, 16 candidates, both ways
    python benchmarks/quality.py --model runs/mine --result runs/mine/quality.json

The same evaluation as `unclip evaluate`; prints the README's table in markdown. Interrupted, it goes on when
started again. On two CPU cores it takes about 15 minutes.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from report import RESULTS, save
from training.evaluation.measure import measure
from training.evaluation.tables import fault_table, in_words, table


def main(
    model: Annotated[str, typer.Option(help="Bundled name, diffusers folder or hub id.")] = "shapes64",
    number: Annotated[int, typer.Option("-n", min=1, help="Candidates a prompt.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda; a GPU where there is one.")] = None,
    work: Annotated[Path, typer.Option(help="Where an interrupted evaluation goes on.")] = Path("runs/quality"),
    result: Annotated[Path, typer.Option(help="The file kept.")] = RESULTS / "quality.json",
) -> None:
    """Measure quality."""
    found = measure(model, work, number=number, device=device)
    save(found, result)
    words = result.with_name(f"{result.stem}_card.json")  # what a bundle recipe names as `scores`
    words.write_text(json.dumps(in_words(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{table(found)}\n\n{fault_table(found)}")


if __name__ == "__main__":
    typer.run(main)
