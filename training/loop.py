"""The one training loop: accelerate moves, accumulates, clips, averages, logs, saves and resumes; tasks give losses.

Everything random is a function of the seed and the step (order.py and the `rng` handed to the task) or restored from
the checkpoint, so a run that is killed and resumed ends with the same bits on the CPU as one that never stopped.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_tensorboard_available
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from gen.weights import quiet
from training.checkpoints import (
    CheckpointError,
    latest,
    load_checkpoint,
    read_state,
    replace_folder,
    save_checkpoint,
)
from training.optimizer import make_optimizer
from training.order import Order
from training.recipe import Recipe, TrainSection, changes
from training.task import Task, moved

logger = logging.getLogger(__name__)

MOST_CHANGES = 5  # of a recipe that are named


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


def check_place(recipe: Recipe) -> None:
    """Refuse what would stop a run only after hours of reading data; cheap, and writes nothing.

    Raises CheckpointError when `recipe.out` holds a checkpoint of another recipe, ValueError when it cannot be
    written, when TensorBoard is missing or when the device cannot compute as asked.
    """
    if not is_tensorboard_available():
        raise ValueError("training logs to TensorBoard, which is not installed; pip install 'unclip[train]'")
    if recipe.train.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError("train.mixed_precision is 'fp16' and the device is a CPU; choose bf16 or no, or use a GPU")
    out = Path(recipe.out)
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"out {recipe.out!r} cannot be written: {nearest} is no folder that lets us; choose another")
    checkpoint = latest(out / "checkpoints")
    if checkpoint is not None and (state := read_state(checkpoint)).get("recipe") != recipe.digest():
        told = changes(state.get("recipe_keys") or recipe.counted(), recipe.counted())  # older ones do not say theirs
        what = f" ({', '.join(told[:MOST_CHANGES])}{', ...' if len(told) > MOST_CHANGES else ''})" if told else ""
        raise CheckpointError(
            f"{checkpoint} was made by another recipe{what}; choose another `out` or remove {out / 'checkpoints'}"
        )


def train(task: Task, recipe: Recipe, *, progress: bool = True) -> Outcome:
    """Train `task` by its recipe in `recipe.out`, going on from the newest checkpoint there.

    Writes `checkpoints/`, `sheets/`, `logs/` (TensorBoard) and `model/` (the average, or the trained weights without
    one). On Ctrl-C the step is finished and a checkpoint written before KeyboardInterrupt goes on. Of many processes
    only the main one writes.

    Raises what `check_place` does, CheckpointError when a checkpoint is damaged, ValueError when the data is too small
    and FloatingPointError when the loss is no longer a number; nothing is saved then.
    """
    check_place(recipe)
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
    checkpoint = latest(out / "checkpoints")
    if recipe.init is not None and checkpoint is None:
        task.start_from(Path(recipe.init))
    average = _average(task.network, config.ema_decay)
    optimizer = make_optimizer(task.network, config, fused=accelerator.device.type in ("cpu", "cuda"))
    if config.compile:
        task.network.compile()

    step, seconds = 0, 0.0
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, network=task.network, average=average, optimizer=optimizer)
        if state.get("reads") != task.reads:
            raise CheckpointError(
                f"{checkpoint} was trained on other pictures, captions or frozen networks than are in place now;"
                f" choose another `out` or remove {out / 'checkpoints'}"
            )
        step, seconds = state["step"], state["seconds"]
        if (before := state.get("processes", 1)) != accelerator.num_processes:
            logger.warning(
                "%s was trained by %d processes and goes on with %d: batches and noise are not those of one run",
                *(checkpoint, before, accelerator.num_processes),
            )
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])

    model, optimizer = accelerator.prepare(task, optimizer)
    accelerator.init_trackers(recipe.task)
    kept = average.module if average is not None else task.network
    started = time.monotonic() - seconds
    saved = None if checkpoint is None else step  # the step of the newest checkpoint

    def save() -> None:
        nonlocal saved
        saved = step
        if accelerator.is_main_process:
            # the model first: a kill between the two must not leave the last checkpoint beside an older model
            with _evaluating(kept), quiet():
                replace_folder(out / "model", lambda folder: task.save(kept, folder))
            extra: dict[str, Any] = {"recipe": recipe.digest(), "recipe_keys": recipe.counted(), "reads": task.reads}
            extra["seconds"] = time.monotonic() - started
            extra["processes"] = accelerator.num_processes
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

    batches = _batches(task, order, config, accelerator, first_step=step)
    shown = progress and accelerator.is_main_process
    with _bar(shown, recipe.task, step, config.steps) as show, _deferred_interrupt() as interrupted:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            task.progress = step / config.steps
            losses = _step(model, batches, optimizer, accelerator, config)
            step += 1
            if average is not None:
                _follow(average, task.network, config.ema_decay or 0.0)
            logged = step % config.log_every == 0 or step == config.steps
            saves = step % config.save_every == 0 and step < config.steps
            if logged or saves:
                values = _finite(losses, step, accelerator)
            if logged:
                accelerator.log({**values, "learning_rate": learning_rate(config, step - 1)}, step=step)
                show(step, values, time.monotonic() - started)
            if saves:
                save()
            if step % config.sheet_every == 0 and step < config.steps and accelerator.is_main_process:
                _write_sheet(task, kept, out / "sheets" / f"{step:08d}.png")
            if _all_stop(accelerator, interrupted(), logged):
                if saved != step:
                    save()
                _leave(accelerator)
                raise KeyboardInterrupt
    scores: dict[str, float] = {}
    if accelerator.is_main_process:
        if saved != step or not (out / "model").exists():
            save()
        with _evaluating(kept):
            scores = task.measure(kept)
        _write_sheet(task, kept, out / "sheets" / "final.png")
        accelerator.log(scores, step=step)
    _leave(accelerator)
    return Outcome(out / "model", step, time.monotonic() - started, scores)


def _leave(accelerator: Accelerator) -> None:
    """Wait for every process, then end what joins them: threads of a group left open can abort an interpreter."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


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


def _finite(losses: dict[str, Tensor], step: int, accelerator: Accelerator) -> dict[str, float]:
    """The losses as numbers: the loop's only wait for the device. FloatingPointError when one is not a number."""
    values = {name: value.item() for name, value in losses.items()}
    watched = ["loss"] if accelerator.scaler is not None else ["loss", "grad_norm"]  # float16 skips steps that overflow
    for name in watched:
        if name in values and not math.isfinite(values[name]):
            raise FloatingPointError(f"{name} is {values[name]} at step {step}; lower train.learning_rate")
    return values


def _all_stop(accelerator: Accelerator, interrupted: bool, meet: bool) -> bool:
    """Whether to stop here. Many processes ask each other where they `meet`: one alone would leave the rest waiting."""
    if accelerator.num_processes == 1 or not meet:
        return interrupted and accelerator.num_processes == 1
    return bool(accelerator.reduce(torch.tensor(float(interrupted), device=accelerator.device)).item() > 0)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, so that no checkpoint holds half of one; a second Ctrl-C does not wait."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the processes that read data too; they stop when the training process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # or every start would draw from the state that dropout reads
    )
    for number, batch in zip(range(start, stop, world), loader, strict=True):
        rng = torch.Generator(accelerator.device).manual_seed((config.seed * 1_000_003 + number) % 2**32)
        yield moved(batch, accelerator.device), rng


def _average(network: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy of the network that will follow it; None without a decay."""
    return None if decay is None else AveragedModel(network)


@torch.no_grad()
def _follow(average: AveragedModel, network: nn.Module, decay: float) -> None:
    """An exponential moving average whose decay warms up as (1 + n) / (10 + n), so early weights fade.

    Not AveragedModel's own update, which waits for the device at every step.
    """
    count = int(average.n_averaged)  # on the CPU
    kept = min(decay, (1 + count) / (10 + count)) if count else 0.0
    torch._foreach_lerp_(list(average.module.parameters()), list(network.parameters()), 1 - kept)
    for held, current in zip(average.module.buffers(), network.buffers(), strict=True):
        held.copy_(current)
    average.n_averaged += 1


def _write_sheet(task: Task, network: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.png")
    with _evaluating(network):
        task.sheet(network).save(partial)
    shutil.move(partial, path)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Look at a network without dropout, gradients or a trace in the random state, then train on as before."""
    training = network.training
    network.eval()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        network.train(training)


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
