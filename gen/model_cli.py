"""The model that a verb paints by, as it was typed: read, and given what is added to it.

It must not import torch before a model is read, for `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen.wording import say

if TYPE_CHECKING:
    from gen.pipeline import TextToImage

READ = (  # words of `TextToImage.from_pretrained`
    "model",
    "dtype",
    "runtime",
    "attention",
    "weak_unet",
    "draft_unet",
    "prior_model",
    "clip",
    "config",
)
ADDED = ("lora", "embedding", "ip_adapter", "image_encoder")


def typed_model(verb: str, words: dict[str, Any], *, quiet: bool) -> TextToImage:
    """The model that words name, which are taken out; ValueError for what is wrong with them."""
    read = {name: words.pop(name) for name in READ}
    lora, embedding, shown, image_encoder = (words.pop(name) for name in ADDED)
    loras = [_scaled("--lora", given) for given in lora or []]
    embeddings = [_called(given) for given in embedding or []]
    ip_adapter = None if shown is None else _scaled("--ip-adapter", shown)

    from gen.pipeline import TextToImage

    model = TextToImage.from_pretrained(read.pop("model"), **read)
    if read["runtime"] != "torch" and not quiet:
        say(verb, f"{read['runtime']} reads and compiles each network when it is first asked, which takes a while")
    for file, scale in loras:
        model.load_lora(file, scale)
    for file, token in embeddings:
        model.load_textual_inversion(file, token)
    if ip_adapter is not None:
        model.load_ip_adapter(*ip_adapter, image_encoder)
    return model


def _scaled(option: str, given: str) -> tuple[str, float]:
    """FILE[:SCALE] as file and scale, which is 1 where it is left out; ValueError where that is no number."""
    path, _, scale = given.rpartition(":")
    try:
        return (path, float(scale)) if path else (given, 1.0)
    except ValueError:
        if Path(given).exists() or len(path) < 2 or "/" in scale:  # a colon of the path's own, or a drive's
            return given, 1.0
        message = f"{option} '{given}': {scale!r} is no scale; give a number, as in {path}:0.8, or leave it out"
        raise ValueError(message) from None


def _called(given: str) -> tuple[str, str | None]:
    """FILE[:TOKEN] as file and token, which is the file's own where it is left out."""
    path, _, token = given.rpartition(":")
    return (path, token) if path and not Path(given).exists() else (given, None)
