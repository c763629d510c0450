"""Training state on disk: tensors in safetensors, everything else JSON, written whole or not at all.

A checkpoint holds the network, its average, the optimiser's moments, the random state and the recipe it belongs to.
It is written under a temporary name and renamed, so a kill at any moment leaves the previous one intact.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_core.wording import one_line

_PREFIX = "step-"
_PARTIAL = ".partial"
_RETIRED = ".old"


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message says why and what to do."""


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a fresh folder, then put it in place of `folder` with renames; all or nothing.

    Raises CheckpointError where no folder can be made.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    retired = folder.with_name(folder.name + _RETIRED)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None
    try:
        write(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.rename(retired)
    partial.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None."""
    found = [path for path in folder.glob(_PREFIX + "*") if path.is_dir() and path.suffix not in (_PARTIAL, _RETIRED)]
    return max(found, key=lambda path: path.name, default=None)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    network: nn.Module,
    average: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint `step` under `folder` and drop all but the newest `keep`. `extra` must be JSON."""
    target = folder / f"{_PREFIX}{step:08d}"
    for suffix in (_PARTIAL, _RETIRED):  # what a kill left
        for path in folder.glob(f"{_PREFIX}*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)

    def write(partial: Path) -> None:
        save_file(_cpu(network.state_dict()), partial / "network.safetensors")
        if average is not None:
            save_file(_cpu(average.state_dict()), partial / "average.safetensors")
        moments, groups = _split_optimizer(optimizer)
        save_file(_cpu(moments), partial / "optimizer.safetensors")
        save_file(_random_state(), partial / "random.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, "optimizer": groups, **extra}, indent=1))

    replace_folder(target, write)
    whole = sorted(path for path in folder.glob(_PREFIX + "*") if path.suffix not in (_PARTIAL, _RETIRED))
    for path in whole[:-keep]:
        shutil.rmtree(path)
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises CheckpointError when it is missing or damaged.
    """
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'} cannot be read ({error}); remove {checkpoint}") from None


def load_checkpoint(
    checkpoint: Path, *, network: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint back, random state included; return its JSON part.

    Raises CheckpointError when a file is missing, damaged or does not fit the network.
    """
    state = read_state(checkpoint)
    try:
        network.load_state_dict(load_file(checkpoint / "network.safetensors"))
        if average is not None:
            average.load_state_dict(load_file(checkpoint / "average.safetensors"))
        _join_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"), state["optimizer"])
        _set_random_state(load_file(checkpoint / "random.safetensors"))
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} cannot be resumed ({one_line(error)}); remove it") from None
    return state


def load_weights(network: nn.Module, folder: Path) -> None:
    """Start `network` from the safetensors of a trained one in `folder`.

    Raises CheckpointError when there are none or they are of another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors to start from; name the folder of a trained part")
    try:
        network.load_state_dict({name: value for file in files for name, value in load_file(file).items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be started from: {one_line(error)}") from None


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # clones, because safetensors refuses tensors that share memory (tied weights are stored twice, and load equal)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    moments = {f"{index}.{name}": value for index, slot in state["state"].items() for name, value in slot.items()}
    return moments, state["param_groups"]


def _join_optimizer(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):  # of another number of devices, those that both have
            if (state := states.get(f"cuda.{index}")) is not None:
                torch.cuda.set_rng_state(state, index)
