"""What a model is put together from: names, folders, files and hub ids, read on a device.

Owns which of them go together. How each is read is `gen.checkpoint`'s, `single_file`'s and `gen.adapters.drafts`'; what
fits what, the families'. It knows no runtime and nothing that is done with a model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from clip_core.clip import CLIP
from gen import checkpoint, single_file
from gen.adapters import drafts
from gen.bucket import is_out_of_memory
from gen.checks import check_name
from gen.families import FAMILIES, FamilyModel
from gen.part import load_part
from gen.room import NoRoom
from gen.weights import files_hash, named_folder


@dataclass(frozen=True)
class LoadedModel:
    """A model on a device."""

    model: FamilyModel
    hash: Callable[[], str]  # SHA-256 of its files
    clip_hash: Callable[[], str] | None  # of those of the CLIP that was named to rank; None: none was


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where a model and what stands beside it come from; None: from the model's own folder, or there is none."""

    name_or_path: str | Path = ""  # empty: it was put together in memory
    config: str | Path | None = None
    prior_model: str | Path | None = None
    clip: str | Path | None = None
    weak_unet: str | Path | None = None
    draft_unet: str | Path | None = None

    def check(self) -> None:
        """Refuse what can be no name (ValueError)."""
        for item in fields(self):
            if (origin := getattr(self, item.name)) is not None or item.name == "name_or_path":
                check_name(item.name, origin)

    def read(self, device: torch.device, dtype: torch.dtype) -> LoadedModel:
        """Read it all; what is unknown, missing or damaged, or does not go together, is a ValueError that names it."""
        weak_folder = None if self.weak_unet is None else named_folder("weak_unet", self.weak_unet)
        draft_folder = None if self.draft_unet is None else named_folder("draft_unet", self.draft_unet)
        parts = self._parts(device, dtype)
        ranking = None if self.clip is None else CLIP.from_pretrained(self.clip, device, dtype)
        parts = replace(parts, clip=ranking or parts.clip)
        if parts.family not in FAMILIES:
            what, ours = parts.family or "folder of no class", ", ".join(sorted(FAMILIES))
            raise ValueError(f"model '{self.name_or_path}' is a {what}; ours are: {ours}")
        model = FAMILIES[parts.family].of(parts)
        if weak_folder is not None:
            weak = load_part(UNet2DConditionModel, weak_folder, device, dtype)
            model = model.with_weak(weak, str(self.weak_unet))
        place = draft_folder or parts.folder / drafts.FOLDER
        if draft_folder is not None or place.exists():
            model = model.with_drafter(drafts.read(place, model.unet), str(place))
        return LoadedModel(model, lambda: parts.hash, None if ranking is None else partial(files_hash, ranking.files))

    def read_where_it_fits(self, device: torch.device, dtype: torch.dtype) -> tuple[LoadedModel, bool]:
        """Read it all on a device, or in host memory where a GPU has no room; whether its networks are to take turns.

        NoRoom, a ValueError, where there is no room for that either.
        """
        try:
            return self.read(device, dtype), False
        except Exception as error:
            is_short = isinstance(error, NoRoom) or (is_out_of_memory(error) and not isinstance(error, MemoryError))
            if not is_short or device.type != "cuda":
                raise
            short = str(error)
        gc.collect()  # behind the error, which kept what had been read
        try:
            return self.read(torch.device("cpu"), dtype), True
        except NoRoom as error:
            raise NoRoom(f"{short}; nor can its networks take turns there: {error}") from None

    def _parts(self, device: torch.device, dtype: torch.dtype) -> checkpoint.Parts:
        """The parts of the model's own files, and of its prior's."""
        name = self.name_or_path
        if not single_file.is_single(name):
            if self.config is not None:
                raise ValueError(
                    f"config='{self.config}' is for a single file, and model '{name}' is none; leave it out"
                )
            return checkpoint.load(name, device, dtype, self.prior_model)
        if self.prior_model is not None:
            raise ValueError(f"prior_model '{self.prior_model}' was given, but a single file takes none; leave it out")
        return single_file.load(name, device, dtype, self.config)
