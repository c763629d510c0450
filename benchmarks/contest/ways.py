"""Who takes part: every way to paint and rank, each in a precision, and why one cannot be measured here."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gen.runtime import DTYPES


@dataclass(frozen=True)
class Way:
    """How candidates are painted and ranked."""

    label: str
    is_ours: bool = False
    # Weights are channels-last; a peer also makes no Pillow pictures, ranks tensors and has its best batch size.
    is_tuned: bool = False
    backend: str | None = None  # of the UNet and the autoencoder's decoder: None (eager), "inductor", "openvino"
    runtime: str = "torch"  # of ours: who computes its networks, by its own choice
    devices: tuple[str, ...] = ("cpu", "cuda")


WAYS = {
    "diffusers": Way("diffusers, Pillow pictures, transformers' CLIP"),
    "tuned": Way("the same: channels-last, tensors, best batch size", is_tuned=True),
    "compiled": Way("tuned, fused projections, torch.compile", is_tuned=True, backend="inductor"),
    "openvino": Way("tuned, OpenVINO", is_tuned=True, backend="openvino", devices=("cpu",)),
    "unclip": Way("**unclip**", is_ours=True),
    "unclip-openvino": Way("**unclip**, runtime openvino", is_ours=True, runtime="openvino", devices=("cpu",)),
    "unclip-channels-last": Way("**unclip**, channels-last from outside", is_ours=True, is_tuned=True),
    "unclip-compile": Way("**unclip**, runtime compile", is_ours=True, runtime="compile"),
}


class Entrant(NamedTuple):
    """A way in a precision."""

    way: str
    dtype: str


STOCK, OURS = Entrant("diffusers", "float32"), Entrant("unclip", "float32")  # always there, for what is compared


def refusal(way: Way) -> str | None:
    """Why this way cannot be measured here; None: it can."""
    if "openvino" in (way.backend, way.runtime) and importlib.util.find_spec("openvino") is None:
        return "openvino is not installed"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if (way.backend == "inductor" or way.runtime == "compile") and not any(
        name and shutil.which(name) for name in compilers
    ):
        return "there is no C++ compiler"
    return None


def entrants_of(ways: Sequence[str], dtypes: Sequence[str], device: str) -> list[Entrant]:
    """Who takes part, in the order of their turns; the two that others are compared with always do."""
    asked = {Entrant(way, dtype) for way in ways for dtype in dtypes} | {STOCK, OURS}
    every = [Entrant(way, dtype) for dtype in DTYPES for way in WAYS]
    return [each for each in every if each in asked and device in WAYS[each.way].devices]
