"""The verbs `train` and `data`: options and words for people around the functions that do the work.

Heavy imports wait until a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

PARTS = ("clip", "vae", "prior", "decoder", "draft", "bundle")
RECIPES = sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))  # that come with it

data = typer.Typer(no_args_is_help=True)


@data.callback()
def data_kinds() -> None:
    """Write training data."""  # also what makes `shapes` a word to type: typer drops the name of an only command


def train(
    part: Annotated[str, typer.Argument(metavar="|".join(PARTS), help="What to train; `bundle` joins the parts.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys, as in train.steps=2000."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"A YAML recipe; in training/recipes are {', '.join(RECIPES)}."),
    ] = None,
) -> None:
    """Train a part from a recipe, going on from its newest checkpoint; or bundle trained parts as one model.

    Ctrl-C writes a checkpoint; the same command goes on from it.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown; choose from: {', '.join(PARTS)}")
    if recipe is None:
        raise ValueError(f"no recipe is given; say --recipe training/recipes/shapes64_{part}.yaml, or your own")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from training.recipe import RecipeError, check, load_recipe

    fields = load_recipe(recipe, overrides or [])
    if fields.get("task") != part:
        raise RecipeError(f"{recipe} is a recipe for {fields.get('task')!r}, not for {part!r}")
    if part == "bundle":
        from training.bundle import BundleRecipe, bundle

        typer.echo(f"wrote {bundle(check(BundleRecipe, fields))}")
        return
    from accelerate import PartialState

    from training.loop import check_place
    from training.loop import train as run
    from training.parts import PART_TASKS

    recipe_class, task_class = PART_TASKS[part]
    checked = check(recipe_class, fields)
    check_place(checked)
    task = task_class(checked)
    outcome = run(task, checked)
    if not PartialState().is_main_process:
        return
    if task.skipped.counts:
        typer.echo(f"of the data in {checked.data}, {task.skipped}", err=True)
    scores = "  ".join(f"{name} {value:.4f}" for name, value in outcome.scores.items())
    typer.echo(f"wrote {outcome.folder} after {outcome.step} steps, {outcome.seconds:.0f} s  {scores}")


@data.command("shapes")
def data_shapes(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    number: Annotated[int, typer.Option("--num", min=1, help="Pictures.")] = 60_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other scenes.")] = 0,
    shards: Annotated[bool, typer.Option("--shards", help="webdataset tar shards, not an image folder.")] = False,
) -> None:
    """Write Shapes: captioned 64x64 pictures whose content a program can check."""
    from rich.console import Console
    from rich.progress import track

    from training.data.folder import write_folder
    from training.data.shapes_set import shapes

    pictures = track(shapes(number, seed), "drawing", total=number, console=Console(stderr=True))
    if shards:
        from training.data.shards import write_shards

        written = write_shards(out, pictures)
    else:
        written = write_folder(out, pictures)
    typer.echo(f"wrote {written} pictures to {out}")
