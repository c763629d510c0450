"""From a name to a model and back: bundled name, diffusers folder, hub id.

Owns what lies on disk: which files a model has, what a missing or damaged one is called, what the model
itself says it knows (`unclip.json`), and its hash. Weights are safetensors only, never pickle, and no code is
ever taken from a checkpoint. Text towers that are stored twice are loaded once. What the parts do together is
a family's to say.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.clip import CLIP
from clip_core.convert import to_transformers
from clip_core.fit import check_asked, check_fit, check_sizes, misshaped
from clip_core.hub import HUB_ERRORS
from clip_core.load import load_tokenizer
from clip_core.text import with_projection, without_projection
from clip_core.weights import read_json
from clip_core.wording import one_line
from gen.hub import download
from gen.room import check_room
from gen.settings import JSON
from gen.weights import (
    check_weights,
    damaged,
    files_hash,
    files_of,
    held,
    numbers,
    of_one_variant,
    quiet,
    same_weights,
)

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
INDEX, CARD = "model_index.json", "unclip.json"
LICENCES = ("LICENSE*", "LICENCE*", "License*")
IMAGE_PARTS = ("feature_extractor", "image_encoder")  # what makes an image embedding of a picture
KINDS = (  # what a part can be
    *(nn.Module, diffusers.SchedulerMixin, transformers.PreTrainedTokenizerBase),
    *(transformers.ImageProcessingMixin, transformers.ProcessorMixin),
)
UNUSED = ("safety_checker", *IMAGE_PARTS)  # parts that nothing here asks
SEEING = (  # families that ask the image parts
    *("StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline"),
    "UnCLIPImageVariationPipeline",
)
# Not in diffusers' top level: by the name of the class, the package of pipelines that indices name for it.
OURS: dict[str, tuple[str, type]] = {
    "MultilingualCLIP": ("kandinsky", MultilingualCLIP),
    "StableUnCLIPImageNormalizer": ("stable_diffusion", StableUnCLIPImageNormalizer),
    "UnCLIPTextProjModel": ("unclip", UnCLIPTextProjModel),
}
PRIOR = "prior_"  # stands before the names of the prior's parts in a folder of both


class Joined(NamedTuple):
    """A decoder whose prior is a folder of its own."""

    prior: str  # the pipeline class of that folder
    both: str  # that of a folder of both
    parts: Mapping[str, str] | None = None  # the prior's by their names in a folder of both; None: all, behind `PRIOR`


OF_KARLO = {"prior": "prior", "prior_scheduler": "prior_scheduler"}
OF_KARLO |= {f"{PRIOR}{name}": name for name in ("tokenizer", "text_encoder")}
JOINED = {
    "KandinskyPipeline": Joined("KandinskyPriorPipeline", "KandinskyCombinedPipeline"),
    "KandinskyInpaintPipeline": Joined("KandinskyPriorPipeline", "KandinskyInpaintCombinedPipeline"),
    "KandinskyV22Pipeline": Joined("KandinskyV22PriorPipeline", "KandinskyV22CombinedPipeline"),
    "KandinskyV22InpaintPipeline": Joined("KandinskyV22PriorPipeline", "KandinskyV22InpaintCombinedPipeline"),
    "StableUnCLIPImg2ImgPipeline": Joined("UnCLIPPipeline", "StableUnCLIPPipeline", OF_KARLO),
}
ALONE = {joined.prior for joined in JOINED.values() if joined.parts is None}  # folders of a prior and nothing else


class Apart(NamedTuple):
    """A prior of its own folder, beside a decoder."""

    folder: Path
    names: Mapping[str, str]  # its parts there, by their names in a folder of both
    family: str  # the pipeline class of a folder of both


@dataclass(frozen=True)
class Card:
    """What a model says of itself (`unclip.json`); a folder without one knows nothing of us."""

    knows: str = ""  # one line for people: what it can be asked for
    words: tuple[str, ...] = ()  # every word it was trained on; empty: any
    defaults: dict[str, Any] = field(default_factory=dict)  # of the settings, by their names in `Settings`
    scores: dict[str, Any] = field(default_factory=dict)  # what it reached, and how that was measured
    more: dict[str, Any] = field(default_factory=dict)  # whatever else it says: hardware, time, data

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a folder; an empty one where there is none."""
        path = folder / CARD
        if not path.exists():
            return cls()
        told = read_json(path)
        known: dict[str, Any] = {}
        for name, kind in {"knows": str, "words": list, "defaults": dict, "scores": dict}.items():
            if name in told and not isinstance(known.setdefault(name, told.pop(name)), kind):
                raise ValueError(f"model file '{path}' is damaged ({name} is no {kind.__name__}); correct it")
        known["words"] = tuple(known.get("words", ()))
        return cls(**known, more=told)

    def to_json(self) -> dict[str, JSON]:
        """As it stands in `unclip.json`."""
        told = {"knows": self.knows, "defaults": self.defaults, "scores": self.scores, **self.more}
        return told | ({"words": list(self.words)} if self.words else {})

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the model never saw; none where it does not say what it saw."""
        known = set(self.words)
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
        return [word for word in words if known and word not in known]


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


def find(name_or_path: str | Path, parts: Collection[str] | None = None) -> Path:
    """The folder of a bundled name, a path or a hub id; ValueError where there is none.

    `parts` are those that are fetched of a hub's repository; None: all that its index lists and that are used here.
    """
    name = str(name_or_path)
    if "/" not in name and (ASSETS / name / INDEX).exists():
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"model '{name}' is a single file; give a folder that diffusers saved")
    if path.is_dir():
        if not (path / INDEX).exists():
            raise ValueError(f"model folder '{name}' has no {INDEX}; give a folder that diffusers saved")
        return path
    names = name.split("/")
    if len(names) == 2 and all(names) and not name.startswith((".", "~")):
        return fetched(name, parts)
    raise ValueError(
        f"model '{name}' is unknown; give a bundled name ({', '.join(bundled())}), "
        "a diffusers folder that exists, or a hub id such as owner/name"
    )


def fetched(repo: str, parts: Collection[str] | None) -> Path:
    """The local copy of a hub repository."""
    try:
        return download(repo, INDEX, [CARD, *LICENCES], lambda path: [*(parts or (*listed(read_json(path)), "clip"))])
    except HUB_ERRORS as error:
        raise ValueError(
            f"model '{repo}' is no folder here and cannot be fetched from the hub ({one_line(error)}); "
            f"check the name, or use a bundled one ({', '.join(bundled())})"
        ) from error


def bundled() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INDEX}"))


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
    clip = load_clip(folder / "clip", device, dtype) if (folder / "clip").is_dir() else None
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


def family_of(index: Mapping[str, Any]) -> str:
    """The pipeline class of model_index.json, empty where it says none; ValueError for code beside the model."""
    family = index.get("_class_name", "")
    if not isinstance(family, str):  # a list, as diffusers writes it for such code
        raise ValueError(f"{INDEX} names the custom pipeline {family}, whose code is never run; give a folder without")
    return family


def listed(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that model_index.json lists and that are used here, each as (library, class).

    Those that see pictures are used where all of them are listed.
    """
    family = family_of(index)
    sees = family in SEEING and all(isinstance(index.get(name), list) for name in IMAGE_PARTS)
    unused: Sequence[str] = UNUSED[:1] if sees else UNUSED
    if family in ALONE:
        unused = ()
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and name not in unused}
    if away := [name for name in entries if Path(name).name != name]:
        raise ValueError(f"{INDEX} names a part {away[0]!r}, which is no folder beside it")
    return {name: (entry[0], entry[1]) for name, entry in entries.items() if len(entry) == 2 and all(entry)}


def part_class(library: str, name: str, where: Path) -> type:
    """The class an entry of model_index.json names: a network, tokenizer, scheduler or processor of the two libraries.

    Never one that chooses the class by itself (`AutoModel`) or loads others (pipelines): those can read pickle, and run
    code that lies beside a model.
    """
    _, found = OURS.get(name, ("", None))
    for known in (diffusers, transformers):
        found = found or (getattr(known, name, None) if library != "unclip" else None)
    if found is not None and ".dummy_" in found.__module__:  # what diffusers has in place of a class it cannot import
        raise ValueError(
            f"{where}: {library}.{name} needs a package that is not here, and is not supported; take another"
        )
    if not isinstance(found, type) or not issubclass(found, KINDS):
        ours = ", ".join(sorted(OURS))
        raise ValueError(f"{where}: {library}.{name} is no class of diffusers or transformers, nor one of: {ours}")
    return found


def load_part(kind: type, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """One part from its folder by its library's own loader; networks must find every weight."""
    if not folder.is_dir():
        raise ValueError(f"model part '{folder}' is missing; the folder is not complete")
    if issubclass(kind, CLIPTokenizer):
        return load_tokenizer(folder)
    if not issubclass(kind, nn.Module):
        return load_settings(kind, folder)
    what = f"model part '{folder}'"
    told = read_json(folder / "config.json")
    check_weights(folder)
    check_sizes(told, what)
    with damaged(folder):
        network = unfilled(kind, told)
    check_asked(network, numbers(folder), what)
    check_fit(what, [], misshaped(network, held(folder)), [])  # all of them, where diffusers would name one
    _, variant = of_one_variant([path.name for path in folder.glob("*.safetensors")])
    words: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": True}
    words["variant"] = variant
    if issubclass(kind, transformers.PreTrainedModel):  # reports misshaped weights of other names too
        words |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        words["torch_dtype"] = dtype
    with damaged(folder), quiet():
        module, report = kind.from_pretrained(folder, **words)  # type: ignore[attr-defined]
    apart = [f"{key} {tuple(given)}" for key, given, _ in report["mismatched_keys"]]
    check_fit(what, report["missing_keys"], apart, report["unexpected_keys"])
    return module.to(device).eval().requires_grad_(False)


def load_settings(kind: Any, folder: Path) -> Any:
    """A part that has no weights: a scheduler, a processor or a tokenizer that is not CLIP's."""
    for name in ("scheduler_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            check_sizes(read_json(folder / name), f"model part '{folder}'")
    with damaged(folder):
        return kind.from_pretrained(folder)


def unfilled(kind: Any, told: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers or transformers of the sizes that its configuration says, with no weights yet."""
    with torch.device("meta"):
        if issubclass(kind, transformers.PreTrainedModel):
            return kind(kind.config_class.from_dict(told))
        return kind.from_config(told)


def load_clip(name_or_folder: str | Path, device: torch.device | str, dtype: torch.dtype) -> CLIP:
    """The whole CLIP that ranks, as `CLIP.from_pretrained` finds it."""
    return CLIP.from_pretrained(name_or_folder, device, dtype)


def stored_twice(folder: Path, index: Mapping[str, Any]) -> dict[str, type]:
    """The text towers of a folder that stand in its `clip/` bit for bit, by their names, with their classes."""
    config = folder / "clip" / "config.json"
    if not config.is_file() or (told := read_json(config)).get("model_type") != CLIPConfig.model_type:
        return {}
    with damaged(folder / "clip"):
        whole = CLIPConfig.from_dict(told).text_config.to_dict()  # defaults filled in
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
    entries: dict[str, JSON] = {}
    for name, part in sorted(parts.items()):
        save_part(part, folder / name, dtype)
        kind = type(part).__name__
        entries[name] = [OURS[kind][0] if kind in OURS else type(part).__module__.split(".")[0], kind]
    if clip is not None:
        save_part(clip.model, folder / "clip", dtype)
        clip.tokenizer.save_pretrained(folder / "clip")
        write_json(folder / "clip" / "preprocessor_config.json", clip.preprocess.to_config())
    told = {"_class_name": pipeline_class, "_diffusers_version": diffusers.__version__, **entries, **(options or {})}
    write_json(folder / INDEX, told)
    if card is not None:
        write_json(folder / CARD, card.to_json())
    return folder


def save_part(part: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Write one part by its library's own writer; a network in memory keeps its precision."""
    if isinstance(part, nn.Module) and dtype is not None:
        part = nn.Module.to(copy.deepcopy(part), dtype)
    with quiet():
        part.save_pretrained(folder)
    if isinstance(part, transformers.PreTrainedModel):
        # or stock loads float16 text towers as float16 beside diffusers' float32, and fails on the mix
        write_json(folder / "config.json", read_json(folder / "config.json") | {"dtype": "float32"})


def write_json(path: Path, told: Mapping[str, JSON]) -> None:
    """A JSON object as a file for people to read."""
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
