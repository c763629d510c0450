"""From a name or a folder to a CLIP's model, tokenizer and preprocessing, with every file checked first.

Only safetensors are read, never pickle, and no code from a checkpoint. A folder is read without network; a
hub id or an "open_clip:NAME/TAG" is the user's word that the network may be used. What is wrong with files is
said in one line that names the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPTokenizer, SiglipConfig

from clip_core.fit import check_asked, check_sizes
from clip_core.hub import fetch
from clip_core.preprocess import Preprocess
from clip_core.weights import CONFIG_SUFFIXES, PICKLES, fill, opened, read_json, shapes, shards
from clip_core.wording import one_line

OPEN_CLIP_PREFIX = "open_clip:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
)
WEIGHTS = "model.safetensors"
FILE = "CLIP file"  # what its files are called where one is missing or damaged
CONFIGS = {"clip": CLIPConfig, "siglip": SiglipConfig}  # by the model_type of config.json
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class CLIPParts(NamedTuple):
    """What a CLIP is made of."""

    model: nn.Module
    tokenizer: Any
    preprocess: Preprocess
    files: dict[str, Path]  # all that it was read from, by name


def load(name_or_folder: str | Path, dtype: torch.dtype, attn_implementation: str) -> CLIPParts:
    """Find out what kind of CLIP it is and load it; see `clip_core.clip.CLIP.from_pretrained`."""
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _load_folder(folder, dtype, attn_implementation, network=False)
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the CLIP folder that it lies in")
    if name.startswith(OPEN_CLIP_PREFIX):
        return _load_open_clip_name(name.removeprefix(OPEN_CLIP_PREFIX), dtype)
    if not HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        raise ValueError(
            f"CLIP {name!r} is no folder; give a CLIP folder, a hub id such as openai/clip-vit-base-patch32, "
            f"or {OPEN_CLIP_PREFIX}NAME/TAG"
        )
    return _load_folder(_download(name), dtype, attn_implementation, network=True)


def _load_folder(folder: Path, dtype: torch.dtype, attn_implementation: str, network: bool) -> CLIPParts:
    if (folder / "config.json").is_file():
        return _load_transformers(folder, dtype, attn_implementation)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _load_open_clip(folder, dtype, network)
    raise ValueError(f"{folder} has neither config.json nor {OPEN_CLIP_CONFIG}; it is not a CLIP folder")


def _load_transformers(folder: Path, dtype: torch.dtype, attn_implementation: str) -> CLIPParts:
    values = read_json(folder / "config.json", FILE)
    check_sizes(values, f"CLIP '{folder}'")
    kind = values.get("model_type")
    if kind not in CONFIGS:
        can = " and ".join(map(repr, CONFIGS))
        raise ValueError(f"{folder / 'config.json'} is of model_type {kind!r}; only {can} can be used here")
    try:
        config = CONFIGS[kind].from_dict(values)
        with torch.device("meta"):  # shapes without memory, and no random numbers drawn
            model = AutoModel.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a CLIP: {one_line(error)}") from error
    files = _weight_files(folder)
    fill(model, _read_weights(files), f"CLIP '{folder}'", dtype)
    tokenizer = load_tokenizer(folder) if kind == "clip" else _load_siglip_tokenizer(folder)
    return CLIPParts(model, tokenizer, Preprocess.from_folder(folder), _files(folder, files))


def _files(folder: Path, weights: Sequence[Path]) -> dict[str, Path]:
    """By name these weights of a folder and whatever else it says; weights that were not read are left out."""
    others = (path for path in folder.iterdir() if path.suffix in CONFIG_SUFFIXES)
    return {path.name: path for path in sorted({*others, *weights})}


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        raise _no_weights(folder, WEIGHTS)
    return shards(index, FILE)


def _read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of these files."""
    weights: dict[str, Tensor] = {}
    for path in files:
        with opened(path, FILE) as file:
            weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118, no Mapping
    return weights


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder; ValueError that names a missing or damaged file."""
    if not _has_tokenizer(folder):  # transformers would make an empty one up
        raise ValueError(f"{folder / 'tokenizer.json'} is missing (and so are vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust reader raises plain Exception
        raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {one_line(error)}") from error


def _load_siglip_tokenizer(folder: Path) -> Any:
    """The tokenizer that a SigLIP folder names: SigLIP's own, SigLIP 2's, Gemma's."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; it says which tokenizer this SigLIP reads by")
    kind = read_json(path, FILE).get("tokenizer_class")
    if kind == "SiglipTokenizer" and not (find_spec("sentencepiece") and find_spec("google.protobuf")):
        # or transformers would take another, which neither lowers case nor drops punctuation
        raise ValueError(f"the tokenizer of {folder} is a {kind}, for which pip install 'unclip[siglip]'")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust reader raises plain Exception
        raise ValueError(f"the tokenizer of {folder} cannot be read: {one_line(error)}") from error


def _has_tokenizer(folder: Path) -> bool:
    legacy = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return legacy or (folder / "tokenizer.json").is_file()


def _load_open_clip(folder: Path, dtype: torch.dtype, network: bool) -> CLIPParts:
    """A folder as open_clip's `save_for_hf` or `clip_core.convert` writes it."""
    path = folder / OPEN_CLIP_CONFIG
    config = read_json(path, FILE)
    check_sizes(config, f"CLIP '{folder}'")
    text = config.get("model_cfg", {}).get("text_cfg")
    if not isinstance(text, dict):
        raise ValueError(f"{path} is damaged: it has no model_cfg with a text_cfg")
    tower = text.get("hf_model_name")
    if tower and not network and not Path(tower).is_dir():
        raise ValueError(f"{path} takes its text tower {tower!r} from the hub; give a hub id to allow the network")
    if text.get("hf_tokenizer_name") and not any(folder.glob("tokenizer*")) and not _has_tokenizer(folder):
        raise ValueError(f"{folder / 'tokenizer.json'} is missing; {path} declares a Hugging Face tokenizer")
    if not any((folder / name).is_file() for name in OPEN_CLIP_WEIGHTS):
        raise _no_weights(folder, OPEN_CLIP_WEIGHTS[0])
    weights = next(folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file())
    held = sum(map(prod, shapes(weights, FILE).values()))
    try:
        check_asked(_unfilled(folder), held, f"CLIP '{folder}'")
        model = open_clip.create_model(f"local-dir:{folder}")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(f"{weights} and {path} do not make a CLIP: {one_line(error)}") from error
    return CLIPParts(
        model.to(dtype),
        _open_clip_tokenizer(f"local-dir:{folder}"),
        Preprocess.from_open_clip(model.visual.preprocess_cfg),
        _files(folder, [weights]),
    )


def _unfilled(folder: Path) -> nn.Module:
    """An open_clip folder's model without weights, on the meta device."""
    root = logging.getLogger()  # on which open_clip warns that there are none
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            name = f"local-dir:{folder}"
            return open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    finally:
        root.setLevel(level)


def _load_open_clip_name(name: str, dtype: torch.dtype) -> CLIPParts:
    """One of open_clip's own list, such as ViT-B-32/laion2b_s34b_b79k, its safetensors from the hub."""
    architecture, _, tag = name.rpartition("/")
    config = get_pretrained_cfg(architecture, tag)
    if not config:
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "no tags: see open_clip.list_pretrained()"
        raise ValueError(f"open_clip knows no {name!r}; give NAME/TAG; {architecture!r} has: {tags}")
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if not repository:
        raise ValueError(f"{OPEN_CLIP_PREFIX}{name} is only offered as a pickle, which is never read; choose another")
    file = Path(file).with_suffix(".safetensors").name if file else OPEN_CLIP_WEIGHTS[0]
    try:
        weights = hf_hub_download(repository, file)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"{file} of {repository} cannot be had from the hub: {one_line(error)}") from error
    with opened(Path(weights), FILE):
        pass
    model = open_clip.create_model(
        architecture,
        pretrained=weights,
        force_quick_gelu=config.get("quick_gelu", False),
        force_preprocess_cfg=config,  # it takes mean, std, interpolation and resize_mode
    )
    preprocess = Preprocess.from_open_clip(model.visual.preprocess_cfg)
    files = {f"{architecture}/{file}": Path(weights)}  # what else it is made of, open_clip knows by the architecture
    return CLIPParts(model.to(dtype), _open_clip_tokenizer(architecture), preprocess, files)


def _open_clip_tokenizer(name: str) -> Any:
    try:
        return open_clip.get_tokenizer(name)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"the tokenizer of {name} cannot be read: {one_line(error)}") from error


def _download(repository: str) -> Path:
    """The repository's top folder from the hub, as far as it is read, or from the cache when offline."""
    try:
        return fetch(repository, _needed)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"CLIP {repository!r} is no folder and not on the hub: {one_line(error)}") from error


def _needed(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a CLIP is loaded from: what is said at the top, and one library's weights."""
    tops = [name for name in names if "/" not in name]
    known = (WEIGHTS,) if "config.json" in tops else OPEN_CLIP_WEIGHTS
    weights = [name for name in known if name in tops][:1]
    if not weights:  # shards, whose names an index says
        weights = [name for name in tops if name.endswith(".safetensors") and name not in OPEN_CLIP_WEIGHTS]
    return [*(name for name in tops if name.endswith(CONFIG_SUFFIXES)), *weights]


def _no_weights(folder: Path, wanted: str) -> ValueError:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        return ValueError(
            f"{folder} has its weights as pickle ({pickles[0]}), which is never read; save them as {wanted}"
        )
    return ValueError(f"{folder / wanted} is missing")
