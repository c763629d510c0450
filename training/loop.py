"""The one training loop: accelerate moves, accumulates, clips, averages, logs, saves and resumes; tasks give losses.

Everything random is a function of the seed and the step (order.py and the `rng` handed to the task) or restored from
the checkpoint, so a run that is killed and resumed ends with the same bits on the CPU as one that never stopped.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from training.checkpoints import (
    CheckpointError,
    latest,
    load_checkpoint,
    read_state,
    replace_folder,
    save_checkpoint,
)
from training.order import Order
from training.recipe import Recipe, TrainSection
from training.task import Task

logger = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a finished (or interrupted) run leaves."""

    folder: Path  # the saved model
    step: int
    seconds: float  # of training, over all resumed runs
    scores: dict[str, float]


def learning_rate(train: TrainSection, step: int) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up, then constant or a cosine to zero."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(task: Task, recipe: Recipe, *, progress: bool = True) -> Outcome:
    """Train `task` by its recipe in `recipe.out`, going on from the newest checkpoint there.

    Writes `checkpoints/`, `sheets/`, `logs/` (TensorBoard) and `model/` (the average, or the trained weights without
    one). On Ctrl-C a checkpoint is written before KeyboardInterrupt goes on.

    Raises CheckpointError when the folder holds a checkpoint of another recipe, ValueError when the data is too small.
    """
    config = recipe.train
    out = Path(recipe.out)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_dir=str(out / "logs"),
    )
    order = Order(task.groups(), config.batch_size, config.seed)
    task.to(accelerator.device)
    average = _average(task.network, config.ema_decay)
    optimizer = torch.optim.AdamW(_decayed(task.network, config.weight_decay), config.learning_rate, config.betas)

    step, seconds = 0, 0.0
    checkpoint = latest(out / "checkpoints")
    if checkpoint is not None:
        if read_state(checkpoint).get("recipe") != recipe.digest():
            raise CheckpointError(
                f"{checkpoint} was made by another recipe; choose another `out` or remove {out / 'checkpoints'}"
            )
        state = load_checkpoint(checkpoint, network=task.network, average=average, optimizer=optimizer)
        step, seconds = state["step"], state["seconds"]
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])

    model, optimizer = accelerator.prepare(task, optimizer)
    accelerator.init_trackers(recipe.task)
    kept = average.module if average is not None else task.network
    started = time.monotonic() - seconds

    def save() -> None:
        if accelerator.is_main_process:
            extra: dict[str, Any] = {"recipe": recipe.digest(), "seconds": time.monotonic() - started}
            if accelerator.scaler is not None:
                extra["scaler"] = accelerator.scaler.state_dict()
            save_checkpoint(
                out / "checkpoints",
                step,
                network=task.network,
                average=average,
                optimizer=optimizer.optimizer,
                extra=extra,
                keep=config.keep_checkpoints,
            )
            replace_folder(out / "model", lambda folder: task.save(kept, folder))

    batches = _batches(task, order, config, accelerator, first_step=step)
    with _bar(progress and accelerator.is_main_process, recipe.task, step, config.steps) as show:
        try:
            while step < config.steps:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step)
                losses = _step(model, batches, optimizer, accelerator, config)
                step += 1
                if average is not None:
                    average.update_parameters(task.network)
                if step % config.log_every == 0 or step == config.steps:
                    values = {name: value.item() for name, value in losses.items()}  # the loop's only device sync
                    if not math.isfinite(values["loss"]):
                        raise FloatingPointError(f"loss is {values['loss']} at step {step}; lower train.learning_rate")
                    accelerator.log({**values, "learning_rate": learning_rate(config, step - 1)}, step=step)
                    show(step, values, time.monotonic() - started)
                if step % config.save_every == 0 and step < config.steps:
                    save()
                if step % config.sheet_every == 0 and accelerator.is_main_process:
                    _write_sheet(task, kept, out / "sheets" / f"{step:08d}.png")
        except KeyboardInterrupt:
            save()
            raise
    scores: dict[str, float] = {}
    if accelerator.is_main_process:
        if (
            latest(out / "checkpoints") is None
            or not (out / "model").exists()
            or checkpoint is None
            or step > state["step"]
        ):
            save()
        scores = task.measure(kept)
        _write_sheet(task, kept, out / "sheets" / "final.png")
        accelerator.log(scores, step=step)
    accelerator.end_training()
    return Outcome(out / "model", step, time.monotonic() - started, scores)


def _step(
    model: nn.Module,
    batches: Iterator[tuple[Any, torch.Generator]],
    optimizer: Any,  # AcceleratedOptimizer, untyped upstream
    accelerator: Accelerator,
    config: TrainSection,
) -> dict[str, Tensor]:
    """One optimiser step over `accumulate` batches; the last batch's losses, detached."""
    losses: dict[str, Tensor] = {}
    for _ in range(config.accumulate):
        batch, rng = next(batches)
        with accelerator.accumulate(model):
            losses = model(batch, rng)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and config.max_grad_norm is not None:
                losses["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in losses.items()}


def _batches(
    task: Task, order: Order, config: TrainSection, accelerator: Accelerator, first_step: int
) -> Iterator[tuple[Any, torch.Generator]]:
    """This process's batches from `first_step` on, each with the generator all its noise is drawn from."""
    world, rank = accelerator.num_processes, accelerator.process_index
    start, stop = (count * config.accumulate * world + rank for count in (first_step, config.steps))
    loader = DataLoader(
        task.dataset,
        batch_sampler=order.batches(start, stop, world),
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for number, batch in zip(range(start, stop, world), loader, strict=True):
        rng = torch.Generator(accelerator.device).manual_seed((config.seed * 1_000_003 + number) % 2**32)
        yield _move(batch, accelerator.device), rng


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _move(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_move(value, device) for value in batch)
    return batch


def _average(network: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average whose decay warms up as (1 + n) / (10 + n), so early weights fade."""
    if decay is None:
        return None

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        kept = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, values, 1 - kept)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=False)


def _decayed(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay acts on matrices, not on biases, norms and single scales."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def _write_sheet(task: Task, network: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.png")
    network.eval()
    with torch.no_grad():
        task.sheet(network).save(partial)
    network.train()
    shutil.move(partial, path)


@contextmanager
def _bar(shown: bool, name: str, step: int, steps: int) -> Iterator[Any]:
    """A progress bar on a terminal, a line every so often in a log file, nothing when not asked for."""
    console = Console(stderr=True)
    if not shown:
        yield lambda *_: None
    elif not console.is_terminal:
        yield lambda step, values, seconds: logger.info(
            "%s %d/%d %.0f s  %s",
            name,
            step,
            steps,
            seconds,
            "  ".join(f"{key} {value:.4f}" for key, value in values.items()),
        )
    else:
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            handle = bar.add_task(name, total=steps, completed=step, note="")

            def show(step: int, values: dict[str, float], seconds: float) -> None:
                bar.update(handle, completed=step, note=f"loss {values['loss']:.4f}")

            yield show
