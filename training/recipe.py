"""A recipe: what to train, on what, how long. YAML on disk, checked before any work starts.

A recipe file holds one part (clip, vae, prior, decoder), or a `bundle` that puts trained parts together. Keys can be
overridden on the command line as `train.steps=2000`. Unknown keys, wrong types and
impossible values are one-line errors.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from clip_core.wording import one_line


class RecipeError(ValueError):
    """A recipe is wrong; the message names the key and what it allows."""


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainSection(Section):
    """How any part is trained; the loop reads nothing else."""

    steps: int = Field(gt=0)  # optimiser steps
    batch_size: int = Field(gt=0)  # examples a process takes at once
    learning_rate: float = Field(gt=0)
    seed: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up; cosine ends at zero
    warmup_steps: int = Field(100, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, the rest by AdamW, at one rate
    weight_decay: float = Field(0.01, ge=0)  # on matrices only
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float | None = Field(1.0, gt=0)  # None: no clipping
    accumulate: int = Field(1, gt=0)  # batches a step
    ema_decay: float | None = Field(0.999, gt=0, lt=1)  # None: no average; the trained weights are kept
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False  # torch.compile the trained network; on a CPU that needs a C++ compiler
    workers: int = Field(0, ge=0)  # processes that read data; 0 reads in the training process
    log_every: int = Field(20, gt=0)
    save_every: int = Field(500, gt=0)
    sheet_every: int = Field(1000, gt=0)
    keep_checkpoints: int = Field(1, gt=0)


class Recipe(Section):
    """What every part's recipe has; each task adds its own keys."""

    task: str
    data: str  # an image folder
    out: str  # where checkpoints, logs, sheets and the finished model go
    init: str | None = None  # the folder of a trained network of the same shape to start from; None: random
    train: TrainSection

    def counted(self) -> dict[str, Any]:
        """The keys that a training run depends on: not where and how often it writes, and reads, and how fast."""
        fields = self.model_dump(mode="json")
        for key in ("data", "out"):
            fields.pop(key)
        for key in ("compile", "workers", "log_every", "save_every", "sheet_every", "keep_checkpoints"):
            fields["train"].pop(key)
        return fields

    def digest(self) -> str:
        """Names the recipe on checkpoints, by the keys that count."""
        fields = self.counted()
        for section, key, before in ((fields, "init", None), (fields["train"], "optimizer", "adamw")):
            if section[key] == before:  # checkpoints from before the key was there keep their name
                section.pop(key)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


S = TypeVar("S", bound=Section)
N = TypeVar("N")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two recipes differ, `train.steps was 2 and is 3`; one that is not there is null."""
    first, second = flat(before), flat(now)
    return [
        f"{key} was {json.dumps(first.get(key))} and is {json.dumps(second.get(key))}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def flat(fields: Mapping[str, Any], outer: str = "") -> dict[str, Any]:
    """A recipe's values by their keys, as overrides write them."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= flat(value, f"{outer}{key}.") if isinstance(value, dict) else {f"{outer}{key}": value}
    return found


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's YAML and apply `key.inner=value` overrides, whose values are YAML too.

    Raises RecipeError when the file is missing or not a mapping, or an override has no `=`.
    """
    path = Path(path)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"override {override!r} has no '='; write key=value, for example train.steps=1000")
        *outer, last = key.split(".")
        inner = fields
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"recipe key {key!r} goes through {name!r}, which is a value")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"override {override!r} is not YAML after the '='") from None
    return fields


def check(section: type[S], fields: dict[str, Any]) -> S:
    """The fields as a checked section.

    Raises RecipeError, one line that names the first wrong key and, if it is unknown, the keys there are.
    """
    try:
        return section.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"recipe key {key!r} is unknown; choose from: {', '.join(_keys(section, first['loc']))}"
            ) from None
        if first["type"] == "missing":
            raise RecipeError(f"recipe key {key!r} is missing") from None
        if first["type"] == "value_error":  # our own validators say what was given
            raise RecipeError(f"recipe{' key ' + repr(key) if key else ''}: {first['ctx']['error']}") from None
        raise RecipeError(f"recipe key {key!r} is {first['input']!r}: {first['msg']}") from None


def options_of(network: type, filled_in: Sequence[str] = ()) -> AfterValidator:
    """Checks that a mapping's keys are options of a library's class; `filled_in` are not the recipe's to say."""
    allowed = sorted(set(inspect.signature(network).parameters) - {"self", "args", "kwargs", *filled_in})

    def check_keys(fields: dict[str, Any]) -> dict[str, Any]:
        for key in fields:
            if key in filled_in:
                raise ValueError(f"{key!r} of {network.__name__} follows from the other parts; leave it out")
            if key not in allowed:
                raise ValueError(f"{key!r} is no option of {network.__name__}; choose from: {', '.join(allowed)}")
        return fields

    return AfterValidator(check_keys)


def built(network: Callable[..., N], key: str, options: dict[str, Any]) -> N:
    """A library's object from the options at a recipe's key.

    Raises RecipeError, in one line, with whatever the library says of options that do not go together.
    """
    try:
        return network(**options)
    except Exception as error:  # libraries raise all kinds
        name = getattr(network, "__name__", "network")
        raise RecipeError(f"recipe key {key!r} makes no {name}: {one_line(error)}") from error


def _keys(section: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        inner = section.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return sorted(section.model_fields)
