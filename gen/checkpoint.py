"""A model's parts from its folder and back: every one loaded, ready to run, with the hash of its files.

Text towers that are stored twice are loaded once, and the prior of a decoder may be a folder of its own. Weights are
safetensors only, never pickle, and no code is ever taken from a checkpoint. What the parts do together is a family's to
say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from clip_core.clip import CLIP
from clip_core.convert import to_transformers
from clip_core.text import with_projection, without_projection
from clip_core.weights import read_json
from gen.card import CARD, Card
from gen.model_folder import find
from gen.model_index import ALONE, INDEX, JOINED, PRIOR, entry_of, family_of, listed, part_class
from gen.part import load_part, save_part, write_json
from gen.room import check_room
from gen.settings import JSON
from gen.weights import check_weights, damaged, files_hash, files_of, numbers, same_weights


class Apart(NamedTuple):
    """A prior of its own folder, beside a decoder."""

    folder: Path
    names: Mapping[str, str]  # its parts there, by their names in a folder of both
    family: str  # the pipeline class of a folder of both


@dataclass(frozen=True, eq=False)
class Parts:
    """The loaded parts of a folder: modules, tokenizers and schedulers by their names in model_index.json."""

    family: str  # the pipeline class of model_index.json
    modules: dict[str, Any]
    clip: CLIP | None  # the whole CLIP in clip/, which ranks
    card: Card
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)  # what else model_index.json says
    files: Mapping[str, Path] = field(default_factory=dict)  # all it was read from by name, if not the folder's own
    apart: Apart | None = None  # the prior, where it is a folder of its own

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every file that a picture or its score depends on; the card is not one."""
        parts = {name: self.place(name) for name in sorted([*self.modules, "clip"])}
        return files_hash(self.files or files_of(parts))

    def place(self, name: str) -> Path:
        """The folder of a part."""
        if self.apart is not None and name in self.apart.names:
            return self.apart.folder / self.apart.names[name]
        return self.folder / name


def load(
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prior: str | Path | None = None,  # of a decoder whose prior is a folder or a hub id of its own
) -> Parts:
    """Load every part of a model, ready to run; a missing or damaged file is a ValueError that names it."""
    folder = find(name_or_path)
    index = read_json(folder / INDEX)
    family = family_of(index)
    refuse_prior_alone(name_or_path, family)
    apart = None
    if prior is not None:
        apart = prior_for(prior, name_or_path, family)
        family = apart.family
    shared = stored_twice(folder, index)
    held = [*(folder / name for name in listed(index) if name not in shared), folder / "clip"]
    if apart is not None:
        held += [apart.folder / name for name in apart.names.values()]
    check_room(sum(map(numbers, held)), device, dtype, str(folder))
    clip = CLIP.from_pretrained(folder / "clip", device, dtype) if (folder / "clip").is_dir() else None
    modules = loaded(folder, index, device, dtype, shared)
    if clip is not None:
        modules |= {name: tower_of(kind, clip) for name, kind in shared.items()}
    if apart is not None:
        of_prior = read_json(apart.folder / INDEX)
        others = listed(of_prior).keys() - apart.names.values()
        found = loaded(apart.folder, of_prior, device, dtype, others)
        modules |= {name: found[there] for name, there in apart.names.items()}
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    return Parts(family, modules, clip, Card.read(folder), folder, options, apart=apart)


def loaded(
    folder: Path,
    index: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    without: Collection[str] = (),  # parts that are had from elsewhere
) -> dict[str, Any]:
    """The parts of a folder by their names."""
    return {
        name: load_part(part_class(library, class_name, folder / INDEX), folder / name, device, dtype)
        for name, (library, class_name) in listed(index).items()
        if name not in without
    }


def prior_for(prior: str | Path, model: str | Path, family: str) -> Apart:
    """A decoder's prior; ValueError where it is none of this one."""
    if family in {joined.both for joined in JOINED.values()}:
        raise ValueError(f"prior_model '{prior}' was given, but model '{model}' has its own prior; leave it out")
    if family not in JOINED:
        why = f"but model '{model}' is a {family or 'folder of no class'}, which takes none"
        raise ValueError(f"prior_model '{prior}' was given, {why}; leave it out")
    joined = JOINED[family]
    folder = find(prior, None if joined.parts is None else joined.parts.values())
    index = read_json(folder / INDEX)
    given = family_of(index)
    if given != joined.prior:
        what = given or "folder of no class"
        raise ValueError(f"prior_model '{prior}' is a {what}; model '{model}' needs a {joined.prior}")
    there = listed(index)
    names = {f"{PRIOR}{name}": name for name in there} if joined.parts is None else joined.parts
    if missing := [name for name in names.values() if name not in there]:
        raise ValueError(f"model part '{folder / missing[0]}' is missing from {INDEX}")
    return Apart(folder, names, joined.both)


def refuse_prior_alone(model: str | Path, family: str) -> None:
    """ValueError for a folder that has no decoder."""
    if family in ALONE:
        decoder = next(decoder for decoder, joined in JOINED.items() if joined.prior == family)
        raise ValueError(f"model '{model}' is a prior alone; give it as prior_model, beside a {decoder}")


def stored_twice(folder: Path, index: Mapping[str, Any]) -> dict[str, type]:
    """The text towers of a folder that stand in its `clip/` bit for bit, by their names, with their classes."""
    config = folder / "clip" / "config.json"
    if not config.is_file() or (content := read_json(config)).get("model_type") != CLIPConfig.model_type:
        return {}
    with damaged(folder / "clip"):
        whole = CLIPConfig.from_dict(content).text_config.to_dict()  # defaults filled in
    towers = {name: part_class(*entry, folder / INDEX) for name, entry in listed(index).items()}
    return {
        name: kind
        for name, kind in towers.items()
        if issubclass(kind, CLIPTextModel | CLIPTextModelWithProjection) and is_tower_of(whole, folder, name)
    }


def is_tower_of(whole: Mapping[str, Any], folder: Path, name: str) -> bool:
    """Whether a text tower is that of the CLIP in `clip/`, whose text configuration is `whole`."""
    if not (folder / name).is_dir():
        return False
    for path in (folder / name, folder / "clip"):
        check_weights(path)
    with damaged(folder / name):
        own = CLIPTextConfig.from_dict(read_json(folder / name / "config.json")).to_dict()
    if any(own[key] != whole.get(key) for key in own.keys() - {"architectures", "transformers_version", "dtype"}):
        return False
    return same_weights(folder / name, folder / "clip")


def tower_of(kind: type, clip: CLIP) -> nn.Module:
    """The text tower of a whole CLIP as a part of this class."""
    return without_projection(clip.model) if issubclass(kind, CLIPTextModel) else with_projection(clip.model)


def save(
    folder: str | Path,
    pipeline_class: str,
    parts: Mapping[str, Any],  # modules, tokenizers and schedulers by their names in model_index.json
    clip: CLIP | None = None,
    card: Card | None = None,
    dtype: torch.dtype | None = None,  # of the weights on disk; None: as they are
    options: Mapping[str, JSON] | None = None,  # what else model_index.json says; None: nothing
) -> Path:
    """Write a diffusers folder that stock diffusers loads, with the CLIP in clip/ and the card beside it.

    The folder is to be new or empty, for nothing of what lies there is removed; see `TextToImage.save`.
    """
    clip = None if clip is None else to_transformers(clip)  # refused, where it cannot be, before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, list[str]] = {}
    for name, part in sorted(parts.items()):
        save_part(part, folder / name, dtype)
        entries[name] = entry_of(part)
    if clip is not None:
        save_part(clip.model, folder / "clip", dtype)
        clip.tokenizer.save_pretrained(folder / "clip")
        write_json(folder / "clip" / "preprocessor_config.json", clip.preprocess.to_config())
    index = {"_class_name": pipeline_class, "_diffusers_version": diffusers.__version__, **entries, **(options or {})}
    write_json(folder / INDEX, index)
    if card is not None:
        write_json(folder / CARD, card.to_json())
    return folder
