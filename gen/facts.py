"""What a model tells without its weights being loaded, and nested facts as lines for people.

Sizes come from the headers of safetensors, the hash from the files' bytes, all else from configurations. A folder and
a single file tell the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from clip_core.weights import read_json, shapes
from gen import single_file
from gen.adapters.drafts import DRAFT_CONFIG, is_low_rank
from gen.adapters.drafts import FOLDER as DRAFTS
from gen.card import Card
from gen.model_folder import LICENCES, find
from gen.model_index import INDEX, listed, part_class
from gen.weights import check_weights, files_hash, folder_hash, numbers, sizes, weight_files

TEXTS = {"text_encoder", "text_encoder_2", "prior_text_encoder"}
PICTURES = {"image_encoder", "prior_image_encoder"}
# Which CLIP a tower is of, by its width and layers; Stable Diffusion 2's is stored without the last of its 24
OF_TEXTS: dict[tuple[Any, Any], str] = {
    (768, 12): "CLIP L",
    (1024, 23): "OpenCLIP H",
    (1024, 24): "OpenCLIP H",
    (1280, 32): "OpenCLIP bigG",
}
OF_PICTURES: dict[tuple[Any, Any], str] = {(1024, 24): "CLIP L", (1280, 32): "OpenCLIP H", (1664, 48): "OpenCLIP bigG"}
MULTILINGUAL = "MultilingualCLIP"  # XLM-RoBERTa, whose width and layers are those of OpenCLIP H
SCHEDULED = ("prediction_type", "timestep_spacing", "beta_schedule", "rescale_betas_zero_snr")


def facts_of(name: str, config: str | None = None) -> dict[str, Any]:
    """Everything `info` tells; `config` as in `single_file.load`."""
    facts = _of_file(Path(name).expanduser(), config) if single_file.is_single(name) else _of_folder(name)
    together = {kind: sum(part[kind] for part in facts["parts"].values()) for kind in ("parameters", "bytes")}
    return {"name": name, **together, **facts}


def _of_folder(name: str) -> dict[str, Any]:
    folder = find(name)
    index = read_json(folder / INDEX)
    classes = {part: class_name for part, (_, class_name) in listed(index).items()}
    hashed = sorted([*classes, "clip"])
    if (folder / "clip").is_dir():
        classes["clip"] = (read_json(folder / "clip" / "config.json").get("architectures") or ["CLIPModel"])[0]
    if (folder / DRAFTS).is_dir():
        classes[DRAFTS] = "LoRA" if is_low_rank(folder / DRAFTS) else "UNet2DConditionModel"
    networks = {part for part, (library, name) in listed(index).items() if is_network(library, name, folder / INDEX)}
    networks |= classes.keys() & {"clip", DRAFTS}
    parts = {}
    for part, kind in classes.items():
        if not (folder / part).is_dir():
            raise ValueError(f"model part '{folder / part}' is missing; the folder is not complete")
        if part in networks or weight_files(folder / part):
            check_weights(folder / part)
        size = sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file())
        parts[part] = {"class": kind, "parameters": numbers(folder / part), "bytes": size}
    return {
        "folder": str(folder),
        "family": index.get("_class_name", ""),
        "hash": folder_hash(folder, hashed),
        "parts": parts,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "told": config_facts(folder, classes) | licence_of(folder),
        "card": Card.read(folder).to_json(),
    }


def _of_file(path: Path, config: str | None) -> dict[str, Any]:
    layout, folder = single_file.opened(path, config)
    index = read_json(folder / INDEX)
    held = single_file.parameters(shapes(path), layout)
    taken = single_file.by_part(sizes(path), layout)
    classes = {part: class_name for part, (_, class_name) in listed(index).items()}
    return {
        "folder": str(path),
        "family": layout.pipeline,
        "hash": files_hash(single_file.files(path, folder)),
        "parts": {
            part: {"class": kind, "parameters": held.get(part, 0), "bytes": taken.get(part, 0)}
            for part, kind in classes.items()
        },
        "bytes": path.stat().st_size,
        "told": {"configurations": str(folder), **config_facts(folder, classes)},
        "card": Card().to_json(),
    }


def is_network(library: str, name: str, where: Path) -> bool:
    """Whether a part is to have weights; not where its class is none that is known here."""
    try:
        return issubclass(part_class(library, name, where), nn.Module)
    except ValueError:
        return False


def config_facts(folder: Path, classes: Mapping[str, str]) -> dict[str, Any]:
    """What configurations say of a model's towers, text lengths and schedulers, part by part."""
    facts: dict[str, Any] = {}
    for part, kind in classes.items():
        if part in TEXTS | PICTURES:
            facts[part] = tower(kind, read_json(folder / part / "config.json"), part in PICTURES)
        elif part == DRAFTS:
            facts[part] = drafter(read_json(folder / part / DRAFT_CONFIG))
        elif part == "clip":
            facts[part] = whole_clip(read_json(folder / part / "config.json"))
        elif "tokenizer" in part:
            path = folder / part / "tokenizer_config.json"
            length = read_json(path).get("model_max_length") if path.is_file() else None
            facts[part] = f"{length} tokens" if length else "as many tokens as its tower reads"
        elif "scheduler" in part:
            config = read_json(folder / part / "scheduler_config.json")
            facts[part] = ", ".join([kind, *(f"{name} {config[name]}" for name in SCHEDULED if name in config)])
    return facts


def drafter(config: Mapping[str, Any]) -> str:
    """What a network for drafts was trained for."""
    return f"{config.get('num_inference_steps')} steps, follows guidance {config.get('guidance_scale')}"


def tower(kind: str, config: Mapping[str, Any], sees: bool) -> str:
    """Which CLIP's a tower is, where its sizes tell, and those sizes."""
    width, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    known = (OF_PICTURES if sees else OF_TEXTS).get((width, layers))
    name = kind if kind == MULTILINGUAL else known
    sizes = f"{config.get('hidden_act', 'quick_gelu')}, width {width}, {layers} layers"
    return f"{name}: {sizes}" if name else sizes


def whole_clip(config: Mapping[str, Any]) -> str:
    """What ranks: CLIP or SigLIP, which CLIP where its sizes tell, and E."""
    kind, text = config.get("model_type"), config.get("text_config", {})
    if kind == "siglip":
        return f"siglip, embedding of {config.get('vision_config', {}).get('hidden_size', 768)}"
    known = OF_TEXTS.get((text.get("hidden_size", 512), text.get("num_hidden_layers", 12)))
    return f"{known or kind}, embedding of {config.get('projection_dim', 512)}"


def licence_of(folder: Path) -> dict[str, str]:
    """The first line of a licence that lies in the folder; nothing where none does."""
    for path in (path for pattern in LICENCES for path in sorted(folder.glob(pattern))):
        lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
        return {"licence": f"{next(filter(None, lines), '')} ({path.name})"}
    return {}


def lines_of(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as lines, one fact each; a list of words in one line, of sentences one to a line."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from lines_of(value, indent + "  ")
        elif isinstance(value, list) and any(isinstance(one, str) and " " in one for one in value):
            yield f"{indent}{name}:"
            yield from (f"{indent}  {one}" for one in value)
        elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
            yield f"{indent}{name}:"
            for number, one in enumerate(value, 1):
                yield from lines_of(one if isinstance(one, dict) else {str(number): one}, indent + "  ")
        else:
            yield f"{indent}{name}: {' '.join(map(str, value)) if isinstance(value, list) else value}"
