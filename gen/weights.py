"""The weights of a diffusers folder's parts: which files they are, what these hold by their headers, and their hash.

It knows no families. How a file is read and what is said of a damaged one is `clip_core.weights`'.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from clip_core.weights import PICKLES, opened, shapes, shards
from clip_core.wording import one_line

METADATA = "__metadata__"  # what a header of safetensors says beside its tensors
ADAPTER = "adapter_config.json"  # for which transformers looks by itself where peft is installed


def named_folder(name: str, given: str | Path) -> Path:
    """The folder that a user gave as `name`; ValueError where there is none."""
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{name}: folder '{given}' does not exist; give one that diffusers saved")
    return folder


def check_weights(folder: Path) -> None:
    """ValueError that names a missing, damaged or pickled weight file of a part."""
    if (folder / ADAPTER).exists():
        raise ValueError(f"model part '{folder}' has an {ADAPTER}, by which peft changes weights; load it by load_lora")
    if not (paths := weight_files(folder)):
        pickled = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
        problem = "no .safetensors file; fetch it again"
        if pickled:
            problem = (
                f"only {pickled[0]}, which is pickle and is never read; save the model with safe_serialization=True"
            )
        raise ValueError(f"model part '{folder}' has {problem}")
    for path in paths:
        shapes(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: those its shard index names, or those that lie there, of one variant."""
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        return shards(indices[0])
    names, _ = of_one_variant([path.name for path in folder.glob("*.safetensors")])
    return [folder / name for name in names]


def of_one_variant(names: Iterable[str]) -> tuple[list[str], str | None]:
    """Of the safetensors files of a part those to read, sorted, and their variant: None, or else fp16, or else any.

    A variant stands between two dots of a name, as diffusers writes it: `model.fp16.safetensors`.
    """
    by_variant: dict[str | None, list[str]] = {}
    for name in sorted(names):
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", name.removesuffix(".safetensors"))
        by_variant.setdefault(stem.partition(".")[2] or None, []).append(name)
    variant = next((each for each in (None, "fp16", *by_variant) if each in by_variant), None)
    return by_variant.get(variant, []), variant


def sizes(path: Path) -> dict[str, int]:
    """The bytes of each tensor of a file, by its header alone; ValueError that names a missing or damaged one."""
    with opened(path), path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != METADATA
    }


def held(folder: Path) -> dict[str, tuple[int, ...]]:
    """What the files of a part hold, by their headers; nothing where it has none."""
    return {name: shape for path in weight_files(folder) for name, shape in shapes(path).items()}


def numbers(folder: Path) -> int:
    """How many numbers the weights of a part hold; 0 where it has none."""
    return sum(map(prod, held(folder).values()))


def read(path: Path, prefixes: Sequence[str] = ("",)) -> dict[str, Tensor]:
    """The tensors of a file whose names begin so."""
    with opened(path) as weights:
        return {name: weights.get_tensor(name) for name in weights.keys() if name.startswith(tuple(prefixes))}  # noqa: SIM118


def same_weights(part: Path, whole: Path) -> bool:
    """Whether every tensor of `part` stands bit for bit in `whole`; names may lack a `text_model.`."""
    files = [path / "model.safetensors" for path in (part, whole)]
    if not all(path.exists() for path in files):
        return False  # sharded: too large to be worth comparing
    with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as other:
        there = set(other.keys())
        for key in one.keys():  # noqa: SIM118 - a safe_open is no mapping
            name = key if key in there else f"text_model.{key}"
            if name.endswith("position_ids"):
                continue
            if name not in there:
                return False
            if one.get_slice(key).get_shape() != other.get_slice(name).get_shape():
                return False
            a, b = one.get_tensor(key), other.get_tensor(name)
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
    return True


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Whatever a library says of a part that it cannot load becomes one line that names the part."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"model part '{folder}' cannot be loaded: {one_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars while a part loads; a missing weight is raised by us and needs no report."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    names = ["transformers.modeling_utils", "diffusers.models.modeling_utils"]
    names.append("transformers.distributed.tensor_parallel")  # that layers are not sharded, where nobody asked for it
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def folder_hash(folder: Path, parts: list[str]) -> str:
    """SHA-256 over the names and bytes of the files in these parts of a folder."""
    return files_hash(files_of({part: folder / part for part in parts}))


def files_of(parts: Mapping[str, Path]) -> dict[str, Path]:
    """By name the files that count of parts, each in its folder."""
    files = {f"{part}/{path.name}": path for part, folder in parts.items() for path in sorted(folder.glob("*"))}
    return {name: path for name, path in files.items() if path.suffix in (".safetensors", ".json", ".txt")}


def files_hash(files: Mapping[str, Path]) -> str:
    """SHA-256 over files by their names."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
