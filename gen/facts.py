"""What a model's folder tells without a weight being read, and nested facts as lines for people."""

from collections.abc import Iterator
from math import prod
from typing import Any

from safetensors import safe_open

from gen.checkpoint import INDEX, Card, check_weights, find, folder_hash, listed, read_json, weight_files


def facts_of(name: str) -> dict[str, Any]:
    """Everything `info` tells, from the folder's files; no weight is read, only their headers."""
    folder = find(name)
    index = read_json(folder / INDEX)
    classes = {part: class_name for part, (_, class_name) in listed(index).items()}
    hashed = sorted([*classes, "clip"])
    if (folder / "clip").is_dir():
        classes["clip"] = read_json(folder / "clip" / "config.json").get("architectures", ["CLIPModel"])[0]
    parts = {}
    for part, kind in classes.items():
        if not (folder / part).is_dir():
            raise ValueError(f"model part '{folder / part}' is missing; the folder is not complete")
        files = [path for path in (folder / part).rglob("*") if path.is_file()]
        paths = weight_files(folder / part)
        if paths:
            check_weights(folder / part)
        parameters = 0
        for path in paths:
            with safe_open(path, "np") as weights:
                parameters += sum(prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        parts[part] = {"class": kind, "parameters": parameters, "bytes": sum(f.stat().st_size for f in files)}
    return {
        "name": name,
        "folder": str(folder),
        "family": index.get("_class_name", ""),
        "hash": folder_hash(folder, hashed),
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "card": Card.read(folder).to_json(),
    }


def lines_of(told: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as lines, one fact each; a list of words in one line, of sentences one to a line."""
    for name, value in told.items():
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
