"""From a name to a model and back: bundled name, diffusers folder, hub id.

Owns what lies on disk: which files a model has, what a missing or damaged one is called, what the model
itself says it knows (`unclip.json`), and its hash. Weights are safetensors only, never pickle, and no code is
ever taken from a checkpoint. Text towers that are stored twice are loaded once. What the parts do together is
a family's to say.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from clip_core.clip import CLIP
from clip_core.convert import to_transformers
from clip_core.load import load_tokenizer
from clip_core.text import with_projection, without_projection
from gen.settings import JSON

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
INDEX, CARD = "model_index.json", "unclip.json"
HUB_FILES = ["*.json", "*/*.txt", "*/*.safetensors"]  # what is fetched: never pickle, never code, no single file
IMAGE_PARTS = ("feature_extractor", "image_encoder")  # what makes an image embedding of a picture
UNUSED = ("safety_checker", *IMAGE_PARTS)  # parts that nothing here asks
SEEING = ("StableUnCLIPImg2ImgPipeline", "UnCLIPImageVariationPipeline")  # families that ask the image parts
HUB_SKIPPED = ["*.fp16.*", "*.non_ema.*", "*.ckpt", "*.bin", "safety_checker/*"]
NAMED = 5  # weights that an error names
# Not in diffusers' top level: by the name of the class, the package of pipelines that indices name for it.
OURS: dict[str, tuple[str, type]] = {
    "StableUnCLIPImageNormalizer": ("stable_diffusion", StableUnCLIPImageNormalizer),
    "UnCLIPTextProjModel": ("unclip", UnCLIPTextProjModel),
}


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

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every file that a picture or its score depends on; the card is not one."""
        return folder_hash(self.folder, sorted([*self.modules, "clip"]))


def find(name_or_path: str | Path) -> Path:
    """The folder of a bundled name, a path or a hub id; ValueError where there is none."""
    name = str(name_or_path)
    if "/" not in name and (ASSETS / name / INDEX).exists():
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(
            f"model '{name}' is a single file, which is not read yet; give a diffusers folder, a hub id "
            f"or a bundled name ({', '.join(bundled())})"
        )
    if path.is_dir():
        if not (path / INDEX).exists():
            raise ValueError(f"model folder '{name}' has no {INDEX}; give a folder that diffusers saved")
        return path
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not name.startswith((".", "~")):
        return download(name)
    raise ValueError(
        f"model '{name}' is unknown; give a bundled name ({', '.join(bundled())}), "
        "a diffusers folder that exists, or a hub id such as owner/name"
    )


def bundled() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INDEX}"))


def download(repo: str) -> Path:
    """The local copy of a hub repository, fetched when it is not there yet."""
    try:
        folder = snapshot_download(repo, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model '{repo}' is no folder here and cannot be fetched from the hub ({reason}); "
            f"check the name, or use a bundled one ({', '.join(bundled())})"
        ) from error
    if not (Path(folder) / INDEX).exists():
        raise ValueError(f"model '{repo}' has no {INDEX}; give a repository that diffusers saved")
    return Path(folder)


def load(
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """Load every part of a model, ready to run; a missing or damaged file is a ValueError that names it."""
    folder = find(name_or_path)
    index = read_json(folder / INDEX)
    modules: dict[str, Any] = {}
    clip = load_clip(folder / "clip", device, dtype) if (folder / "clip").is_dir() else None
    for name, (library, class_name) in listed(index).items():
        kind = part_class(library, class_name, folder / INDEX)
        tower = shared_tower(kind, clip, folder, name)
        modules[name] = tower if tower is not None else load_part(kind, folder / name, device, dtype)
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    return Parts(index.get("_class_name", ""), modules, clip, Card.read(folder), folder, options)


def listed(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that model_index.json lists and that are used here, each as (library, class)."""
    unused = UNUSED[:1] if index.get("_class_name") in SEEING else UNUSED
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and name not in unused}
    return {name: (entry[0], entry[1]) for name, entry in entries.items() if len(entry) == 2 and all(entry)}


def part_class(library: str, name: str, where: Path) -> type:
    """The class an entry of model_index.json names; only the two libraries' own are ever taken."""
    _, found = OURS.get(name, ("", None))
    for known in (diffusers, transformers):
        found = found or (getattr(known, name, None) if library != "unclip" else None)
    if not isinstance(found, type):
        raise ValueError(f"{where}: {library}.{name} is no class of diffusers or transformers")
    return found


def load_part(kind: type, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """One part from its folder by its library's own loader; networks must find every weight."""
    if not folder.is_dir():
        raise ValueError(f"model part '{folder}' is missing; the folder is not complete")
    if issubclass(kind, CLIPTokenizer):
        return load_tokenizer(folder)
    if not issubclass(kind, nn.Module):
        with damaged(folder):
            return kind.from_pretrained(folder)  # type: ignore[attr-defined]
    read_json(folder / "config.json")
    check_weights(folder)
    words: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": True}
    if issubclass(kind, transformers.PreTrainedModel):  # reports misshaped weights; diffusers raises and names one
        words |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        words["torch_dtype"] = dtype
    with damaged(folder), quiet():
        module, report = kind.from_pretrained(folder, **words)  # type: ignore[attr-defined]
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model part '{folder}' is damaged: {named(missing)} missing")
    if misshaped := sorted(f"{key} {tuple(given)}" for key, given, _ in report["mismatched_keys"]):
        raise ValueError(f"model part '{folder}' is damaged: {named(misshaped)} of another shape than its config.json")
    if extra := sorted(key for key in report["unexpected_keys"] if not key.endswith("position_ids")):
        logger.warning("model part '%s' has more than its config.json asks for: %s not read", folder, named(extra))
    return module.to(device).eval().requires_grad_(False)


def named(keys: Sequence[str]) -> str:
    """Weights by name, the first five of them and how many more there are, with the verb."""
    if len(keys) == 1:
        return f"weight {keys[0]} is"
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"weights {', '.join(keys[:NAMED])}{more} are"


def load_clip(name_or_folder: str | Path, device: torch.device | str, dtype: torch.dtype) -> CLIP:
    """The whole CLIP that ranks, as `CLIP.from_pretrained` finds it."""
    return CLIP.from_pretrained(name_or_folder, device, dtype)


def shared_tower(kind: type, clip: CLIP | None, folder: Path, name: str) -> nn.Module | None:
    """The text tower of `clip`, when part `name` stores the very same one; else None."""
    if clip is None or not isinstance(clip.model, CLIPModel):
        return None
    if not issubclass(kind, CLIPTextModel | CLIPTextModelWithProjection) or not (folder / name).is_dir():
        return None
    for path in (folder / name, folder / "clip"):
        check_weights(path)
    own = CLIPTextConfig.from_dict(read_json(folder / name / "config.json")).to_dict()  # defaults filled in
    whole = clip.model.config.text_config.to_dict()
    if any(own[key] != whole.get(key) for key in own.keys() - {"architectures", "transformers_version", "dtype"}):
        return None
    if not same_weights(folder / name, folder / "clip"):
        return None
    return without_projection(clip.model) if issubclass(kind, CLIPTextModel) else with_projection(clip.model)


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


def check_weights(folder: Path) -> None:
    """ValueError that names a missing, damaged or pickled weight file of a part."""
    if not (paths := weight_files(folder)):
        pickled = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        told = f"only {pickled[0]}, which is pickle and is never read" if pickled else "no .safetensors file"
        raise ValueError(f"model part '{folder}' has {told}; save the model with safe_serialization=True")
    for path in paths:
        try:
            with safe_open(path, "pt") as weights:
                weights.keys()
        except FileNotFoundError:
            raise ValueError(f"model file '{path}' is missing; the folder is not complete") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model file '{path}' is damaged ({error}); fetch or save it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: those its shard index names, or those that lie there."""
    if shards := sorted(folder.glob("*.safetensors.index.json")):
        named = read_json(shards[0]).get("weight_map")
        if not isinstance(named, dict):
            raise ValueError(f"model file '{shards[0]}' is damaged (it has no weight_map); fetch or save it again")
        return [folder / name for name in sorted(set(named.values()))]
    return sorted(folder.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError that names the file when it is missing or damaged."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model file '{path}' is missing; the folder is not complete") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model file '{path}' is damaged ({error}); fetch or save it again") from None
    if not isinstance(told, dict):
        raise ValueError(f"model file '{path}' is damaged (not a JSON object); fetch or save it again")
    return told


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Whatever a library says of a part that it cannot load becomes one line that names the part."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"model part '{folder}' cannot be loaded: {reason}") from error


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
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("*")):
            if path.suffix in (".safetensors", ".json", ".txt"):
                digest.update(f"{part}/{path.name}\0{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()


def save(
    folder: str | Path,
    pipeline_class: str,
    parts: Mapping[str, Any],  # modules, tokenizers and schedulers by their names in model_index.json
    clip: CLIP | None = None,
    card: Card | None = None,
    dtype: torch.dtype | None = None,  # of the weights on disk; None: as they are
    options: Mapping[str, JSON] | None = None,  # what else model_index.json says; None: nothing
) -> Path:
    """Write a diffusers folder that stock diffusers loads, with the CLIP in clip/ and the card beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, JSON] = {}
    for name, part in sorted(parts.items()):
        save_part(part, folder / name, dtype)
        kind = type(part).__name__
        entries[name] = [OURS[kind][0] if kind in OURS else type(part).__module__.split(".")[0], kind]
    if clip is not None:
        clip = to_transformers(clip)
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
