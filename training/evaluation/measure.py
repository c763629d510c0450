"""A whole evaluation: paints what a ledger misses, summarises it, asks CLIP, and keeps the result.

`evaluate` takes a model as its users call it; `measure` takes its name, and shows a bar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clip_core.weights import content_hash
from gen import TextToImage
from gen.checks import integer
from training.data import checker
from training.data.suite import SHAPES_TEST, Prompt, load
from training.evaluation.ledger import Ledger
from training.evaluation.painting import MODES, Model, Strips, paint
from training.evaluation.rates import TwoTowers, retrieval, summarise
from training.provenance import provenance

MAX_SEED = 2**31  # added to a prompt's own, which is below 2^31, it stays below the 2^32 that a seed may be


def measure(
    model: str,  # a bundled name, a folder or a hub id
    out: Path,  # result.json is written there beside what `evaluate` keeps
    *,
    number: int = 16,  # candidates of a prompt
    modes: Sequence[str] = tuple(MODES),
    seed: int = 0,
    limit: int | None = None,  # only the first so many prompts of each group; None: all
    batch_size: int | None = None,  # pictures painted together; None: 64, on a GPU 1024
    device: str | None = None,  # None: a GPU where there is one
    quiet: bool = False,
) -> dict[str, Any]:
    """Load the model, evaluate it under a bar and write `result.json`.

    ValueError, before anything is loaded, where a number is below 1.
    """
    for name, value in (("number", number), ("limit", limit), ("batch_size", batch_size)):
        if value is not None:
            integer(name, value, 1)
    prompts = load() if limit is None else first_of_each_group(load(), limit)
    painter = TextToImage.from_pretrained(model, device)
    clip = painter.model.clip
    if clip is None:
        raise ValueError(f"model {model!r} has no clip/ to rank with, so there is no best of {number} to measure")
    where = painter.model.device
    about = {
        "suite": "shapes",
        "prompts": _digest(SHAPES_TEST),
        "model": painter.name,
        "model_hash": painter.hash,
        "settings": painter.model.abilities.defaults.to_json(),
        "on": where.type,
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(f"prompts x {number}", total=None)
        try:
            result = evaluate(
                painter,
                clip,
                prompts,
                out,
                about=about,
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


def first_of_each_group(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Fewer prompts to paint; those of retrieval all stay, for they are cheap and make one number."""
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    each = {group: [prompt for prompt in prompts if prompt.group == group] for group in groups}
    return [one for group, some in each.items() for one in (some if group == "retrieval" else some[:limit])]


def evaluate(
    model: Model,
    clip: TwoTowers,
    prompts: Sequence[Prompt],
    folder: Path,  # candidates.jsonl and strips/ are kept there
    *,
    about: dict[str, Any],  # what was evaluated: JSON; a folder holds evaluations of one thing
    modes: Sequence[str] = tuple(MODES),
    num_candidates: int = 16,
    seed: int = 0,
    batch_size: int = 64,  # pictures painted together; no picture depends on it
    device: torch.device | str = "cpu",  # where clip is
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Paint, check and summarise; the result is one JSON object.

    Run again after an interruption, it paints what is missing. ValueError where `folder` holds an evaluation
    of something else.
    """
    if not 0 <= seed < MAX_SEED - num_candidates:
        raise ValueError(f"seed is {seed}; give one from 0 to {MAX_SEED - num_candidates - 1}")
    about = about | {
        "checker": _digest(Path(checker.__file__)),
        "num_candidates": num_candidates,
        "seed": seed,
    }
    ledger = Ledger(folder / "candidates.jsonl", about)
    painted = [prompt for prompt in prompts if prompt.group != "retrieval"]
    total = len(painted) * len(modes)
    left = {mode: ledger.missing(painted, mode) for mode in modes}
    done = total - sum(map(len, left.values()))
    progress(done, total)
    for mode in modes:
        for outcomes in paint(
            model,
            left[mode],
            mode,
            num_candidates=num_candidates,
            seed=seed,
            batch_size=batch_size,
            look=Strips(folder / "strips"),
        ):
            ledger.append(outcomes)
            done += len(outcomes)
            progress(done, total)
    ids = {prompt.id for prompt in painted}
    chosen = [outcome for outcome in ledger.outcomes if outcome.mode in modes and outcome.prompt in ids]
    to_retrieve = [prompt for prompt in prompts if prompt.group == "retrieval"]
    return {
        **about,
        "painted": summarise(chosen),
        "retrieval": retrieval(clip, to_retrieve, device) if to_retrieve else None,
        "seconds": round(sum(outcome.seconds for outcome in chosen), 1),
        **provenance(device),
    }


def _digest(path: Path) -> str:
    """What tells one version of a file from another: the start of its SHA-256."""
    return content_hash(path)[:16]
