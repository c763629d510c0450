"""`model_index.json`: a model's family, and the parts it lists, with their classes.

Which of them are used here, which classes are never taken from a checkpoint, and whose prior is a folder of its own.
It reads nothing itself: an index is handed in as it was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import nn

INDEX = "model_index.json"
IMAGE_PARTS = ("feature_extractor", "image_encoder")  # what makes an image embedding of a picture
KINDS = (  # what a part can be
    *(nn.Module, diffusers.SchedulerMixin, transformers.PreTrainedTokenizerBase),
    *(transformers.ImageProcessingMixin, transformers.ProcessorMixin),
)
UNUSED = ("safety_checker", *IMAGE_PARTS)  # parts that nothing here asks
# Families that ask the image parts.
SEEING = ("StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline", "UnCLIPImageVariationPipeline")
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


def entry_of(part: object) -> list[str]:
    """A part as an index lists it: [library, class]."""
    kind = type(part)
    library, _ = OURS.get(kind.__name__, (kind.__module__.split(".")[0], kind))
    return [library, kind.__name__]
