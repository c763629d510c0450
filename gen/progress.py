"""A progress bar on standard error, moved by the steps that pictures take."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from gen.edit import schedule_of
from gen.flight import Callback, Step
from gen.model import Family
from gen.request import Job
from gen.search import BestOf


def bar() -> Progress:
    """A progress bar on standard error, which leaves standard output to the results."""
    return Progress(console=Console(stderr=True))


def moving(shown: Progress, model: Family, jobs: Sequence[Job], callback: Callback | None) -> Callback:
    """A callback that moves a bar for each stage, and then looks by another where one is given."""
    number = num_steps(model, jobs)
    is_known = all(job.budget is None and isinstance(job.search, BestOf) for job in jobs)
    tasks = {stage: shown.add_task(stage, total=steps if is_known else None) for stage, steps in number.items()}

    def move(step: Step) -> None:
        shown.advance(tasks[step.stage], len(step.seeds))
        if callback is not None:
            callback(step)

    return move


def num_steps(model: Family, jobs: Sequence[Job]) -> dict[str, int]:
    """Steps that all candidates take together where each is painted, by stage; of a stage with any."""
    totals = {"prior": 0, "decoder": 0, "super_resolution": 0}
    for candidate in (candidate for job in jobs for candidate in job.candidates):
        settings = candidate.settings
        totals["decoder"] += schedule_of(model.levels, settings).num_steps
        if settings.prior and model.prior is not None:
            levels = model.prior.levels
            steps = levels.schedule(levels.sampler, settings.prior_num_inference_steps).num_steps
            totals["prior"] += steps * model.prior.num_answers(candidate)
        if model.upscaler is not None:
            levels, steps = model.upscaler.levels, settings.super_res_num_inference_steps
            totals["super_resolution"] += levels.schedule(levels.sampler, steps).num_steps
    return {stage: steps for stage, steps in totals.items() if steps}
