"""One part of a model in its folder: a network, tokenizer, scheduler or processor, loaded and written.

A network is refused before memory is taken where its configuration or its files are damaged, and finds every weight or
is not loaded. Which parts a model has is not known here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CLIPTokenizer

from clip_core.fit import check_asked, check_fit, check_sizes, misshaped
from clip_core.load import load_tokenizer
from clip_core.weights import read_json
from gen.settings import JSON
from gen.weights import check_weights, damaged, held, numbers, of_one_variant, quiet


def load_part(kind: type, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """One part from its folder by its library's own loader; networks must find every weight."""
    if not folder.is_dir():
        raise ValueError(f"model part '{folder}' is missing; the folder is not complete")
    if issubclass(kind, CLIPTokenizer):
        return load_tokenizer(folder)
    if not issubclass(kind, nn.Module):
        return load_settings(kind, folder)
    what = f"model part '{folder}'"
    config = read_json(folder / "config.json")
    check_weights(folder)
    check_sizes(config, what)
    with damaged(folder):
        network = unfilled(kind, config)
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


def unfilled(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers or transformers of the sizes that its configuration says, with no weights yet."""
    with torch.device("meta"):
        if issubclass(kind, transformers.PreTrainedModel):
            return kind(kind.config_class.from_dict(config))
        return kind.from_config(config)


def save_part(part: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Write one part by its library's own writer; a network in memory keeps its precision."""
    if isinstance(part, nn.Module) and dtype is not None:
        part = nn.Module.to(copy.deepcopy(part), dtype)
    with quiet():
        part.save_pretrained(folder)
    if isinstance(part, transformers.PreTrainedModel):
        # or stock loads float16 text towers as float16 beside diffusers' float32, and fails on the mix
        write_json(folder / "config.json", read_json(folder / "config.json") | {"dtype": "float32"})


def write_json(path: Path, content: Mapping[str, JSON]) -> None:
    """A JSON object as a file for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
