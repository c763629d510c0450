"""The one training loop: accelerate moves, accumulates, clips, averages, logs, saves and resumes; tasks give losses.

Everything random is a function of the seed and the step (order.py and the `rng` handed to the task) or restored from
the checkpoint, so a run that is killed and resumed ends with the same bits on the CPU as one that never stopped.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_tensorboard_available
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gen.interrupt import deferred_interrupt
from gen.weights import quiet
from training.average import EMA
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
from training.terminal import bar, ignore_interrupts

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
        diff = changes(state.get("recipe_keys") or recipe.counted(), recipe.counted())  # older ones do not say theirs
        what = f" ({', '.join(diff[:MOST_CHANGES])}{', ...' if len(diff) > MOST_CHANGES else ''})" if diff else ""
        raise CheckpointError(
            f"{checkpoint} was made by another recipe{what}; choose another `out` or remove {out / 'checkpoints'}"
        )


@dataclass(eq=False)
class Run:
    """A task in training: how far it is, and what it leaves in the recipe's `out`.

    Of many processes each has one, and only the main one's writes.
    """

    task: Task
    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module  # the task, as accelerate wraps it
    optimizer: Any  # AcceleratedOptimizer, untyped upstream
    average: EMA | None  # None: there is none, and the trained weights are kept
    step: int = 0  # optimiser steps done, over all resumed runs
    saved: int | None = None  # the step of the newest checkpoint
    started: float = field(default_factory=time.monotonic)  # moved back by what former runs took

    @property
    def out(self) -> Path:
        """Where all is written."""
        return Path(self.recipe.out)

    @property
    def kept(self) -> nn.Module:
        """The network that is looked at and saved."""
        return self.task.network if self.average is None else self.average.module

    @property
    def seconds(self) -> float:
        """Of training, over all resumed runs."""
        return time.monotonic() - self.started

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; CheckpointError when it is damaged or of other data."""
        state = load_checkpoint(
            checkpoint, network=self.task.network, average=self.average, optimizer=self.optimizer.optimizer
        )
        if state.get("reads") != self.task.reads:
            raise CheckpointError(
                f"{checkpoint} was trained on other pictures, captions or frozen networks than are in place now;"
                f" choose another `out` or remove {self.out / 'checkpoints'}"
            )
        if (before := state.get("processes", 1)) != self.accelerator.num_processes:
            logger.warning(
                "%s was trained by %d processes and goes on with %d: batches and noise are not those of one run",
                *(checkpoint, before, self.accelerator.num_processes),
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]
        self.started = time.monotonic() - state["seconds"]

    def advance(self, batches: Iterator[tuple[Any, torch.Generator]]) -> dict[str, Tensor]:
        """One optimiser step over `accumulate` batches; the last batch's losses, detached."""
        config = self.recipe.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.task.progress = self.step / config.steps
        losses: dict[str, Tensor] = {}
        for _ in range(config.accumulate):
            batch, rng = next(batches)
            with self.accelerator.accumulate(self.model):
                losses = self.model(batch, rng)
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients and config.max_grad_norm is not None:
                    parameters = self.model.parameters()
                    losses["grad_norm"] = self.accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.task.network)
        return {name: value.detach() for name, value in losses.items()}

    def save(self) -> None:
        """Write the model and a checkpoint, unless those of this very step are there."""
        if self.saved == self.step and (self.out / "model").exists():
            return
        self.saved = self.step
        if not self.accelerator.is_main_process:
            return
        # the model first: a kill between the two must not leave the last checkpoint beside an older model
        with _evaluating(self.kept), quiet():
            replace_folder(self.out / "model", lambda folder: self.task.save(self.kept, folder))
        extra: dict[str, Any] = {"recipe": self.recipe.digest(), "recipe_keys": self.recipe.counted()}
        extra |= {"reads": self.task.reads, "seconds": self.seconds, "processes": self.accelerator.num_processes}
        if self.accelerator.scaler is not None:
            extra["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(
            self.out / "checkpoints",
            self.step,
            network=self.task.network,
            average=self.average,
            optimizer=self.optimizer.optimizer,
            extra=extra,
            keep=self.recipe.train.keep_checkpoints,
        )

    def write_sheet(self, name: str) -> None:
        """Show what the network does now in `sheets/`."""
        if not self.accelerator.is_main_process:
            return
        path = self.out / "sheets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.png")
        with _evaluating(self.kept):
            self.task.sheet(self.kept).save(partial)
        shutil.move(partial, path)

    def finish(self) -> Outcome:
        """Save, measure and leave; of many processes the main one alone measures."""
        self.save()
        scores: dict[str, float] = {}
        if self.accelerator.is_main_process:
            with _evaluating(self.kept):
                scores = self.task.measure(self.kept)
            self.write_sheet("final")
            self.accelerator.log(scores, step=self.step)
        self.leave()
        return Outcome(self.out / "model", self.step, self.seconds, scores)

    def leave(self) -> None:
        """Wait for every process, then end what joins them: threads of a group left open can abort an interpreter."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def train(task: Task, recipe: Recipe, *, progress: bool = True) -> Outcome:
    """Train `task` by its recipe in `recipe.out`, going on from the newest checkpoint there.

    Writes `checkpoints/`, `sheets/`, `logs/` (TensorBoard) and `model/` (the average, or the trained weights without
    one). On Ctrl-C the step is finished and a checkpoint written before KeyboardInterrupt goes on. Of many processes
    only the main one writes.

    Raises what `check_place` does, CheckpointError when a checkpoint is damaged, ValueError when the data is too small
    and FloatingPointError when the loss is no longer a number; nothing is saved then.
    """
    check_place(recipe)
    config, out = recipe.train, Path(recipe.out)
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
    average = None if config.ema_decay is None else EMA(task.network, config.ema_decay)
    optimizer = make_optimizer(task.network, config, fused=accelerator.device.type in ("cpu", "cuda"))
    if config.compile:
        task.network.compile()
    model, optimizer = accelerator.prepare(task, optimizer)
    run = Run(task, recipe, accelerator, model, optimizer, average)
    if checkpoint is not None:
        run.resume(checkpoint)
    accelerator.init_trackers(recipe.task)
    batches = _batches(task, order, config, accelerator, first_step=run.step)
    shown = progress and accelerator.is_main_process
    with bar(shown, recipe.task, run.step, config.steps) as show, deferred_interrupt() as interrupted:
        while run.step < config.steps:
            losses = run.advance(batches)
            is_last = run.step == config.steps
            logged = run.step % config.log_every == 0 or is_last
            saves = run.step % config.save_every == 0 and not is_last
            if logged or saves:
                values = _finite(losses, run.step, accelerator)
            if logged:
                accelerator.log({**values, "learning_rate": learning_rate(config, run.step - 1)}, step=run.step)
                show(run.step, values, run.seconds)
            if saves:
                run.save()
            if run.step % config.sheet_every == 0 and not is_last:
                run.write_sheet(f"{run.step:08d}")
            if _all_stop(accelerator, interrupted(), logged):
                run.save()
                run.leave()
                raise KeyboardInterrupt
    return run.finish()


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
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # or every start would draw from the state that dropout reads
    )
    for number, batch in zip(range(start, stop, world), loader, strict=True):
        rng = torch.Generator(accelerator.device).manual_seed((config.seed * 1_000_003 + number) % 2**32)
        yield moved(batch, accelerator.device), rng


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
