"""A picture's record: the JSON beside it that paints it again, with every check of what it says of its model.

What it says of the picture itself (prompt, seed, settings, ...) is `gen.candidate.Candidate`'s to write and to read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from gen.adapters.file import Adapter
from gen.origins import Origins
from gen.runtime import DTYPES, Compute
from gen.settings import JSON

VERSION = 1
READ = DTYPES | {"float64": torch.float64}  # which people name as torch's own object alone


@dataclass(frozen=True, kw_only=True)
class Record:
    """What painted a picture; a text that is empty says nothing."""

    picture: Mapping[str, Any]  # what a `Candidate` says of it
    model: str = ""  # what it was loaded by
    model_hash: str = ""
    weak_unet: str = ""  # of a picture that was guided by one
    weak_unet_hash: str = ""
    clip: str = ""  # where it was not the model's own
    clip_hash: str = ""
    config: str = ""
    prior_model: str = ""
    adapters: tuple[Adapter, ...] = ()
    compute: Compute = Compute()  # noqa: RUF009 - frozen

    def to_json(self) -> dict[str, JSON]:
        """As it stands beside a picture."""
        known: dict[str, JSON] = {"version": VERSION, "model": self.model, "model_hash": self.model_hash}
        known |= {name: text for name in TEXTS if name not in known and (text := getattr(self, name))}
        if self.adapters:
            known["adapters"] = [each.to_json() for each in self.adapters]
        return {**self.picture, **known, **self.compute.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Record:
        """As it was read; ValueError for one that is damaged, or of a version to come."""
        version = record.get("version", VERSION)
        if not isinstance(version, int) or version < 1:
            raise damaged("version", version)
        if version > VERSION:
            raise ValueError(f"the record is of version {version}, and here {VERSION} is the last; use a newer unclip")
        for name in (*TEXTS, "dtype", "attention", "runtime"):
            if not isinstance(record.get(name, ""), str):
                raise damaged(name, record[name])
        if not isinstance(record.get("settings", {}), dict):
            raise damaged("settings", record["settings"])
        if not isinstance(adapters := record.get("adapters", []), list):
            raise ValueError(f"the record is damaged: its adapters are {adapters!r}")
        usual, dtype = Compute(), record.get("dtype", "float32")
        if dtype not in READ:
            raise ValueError(f"the record is damaged: its dtype is {dtype!r}; ours are: {', '.join(DTYPES)}")
        return cls(
            picture={name: value for name, value in record.items() if name not in OURS},
            **{name: record[name] for name in TEXTS if name in record},
            adapters=tuple(Adapter.from_json(each) for each in adapters),
            compute=Compute(
                READ[dtype], record.get("runtime", usual.runtime), record.get("attention", usual.attention)
            ),
        )

    @property
    def asks_clip(self) -> bool:
        """Whether its pixels, and not its rank alone, depend on the CLIP that it names."""
        return bool(self.picture.get("settings", {}).get("clip_guidance_scale")) or "variation_of" in self.picture

    @property
    def asks_weak(self) -> bool:
        """Whether it was guided by the weaker UNet."""
        return self.picture.get("settings", {}).get("guidance_rule") == "autoguidance"

    @property
    def origins(self) -> Origins:
        """What its model is put together from; a CLIP that only ranked is no part of that."""
        return Origins(
            name_or_path=self.model,
            config=self.config or None,
            prior_model=self.prior_model or None,
            clip=(self.asks_clip and self.clip) or None,
            weak_unet=self.weak_unet or None,
        )

    def check_model(self, here: Record) -> None:
        """ValueError where the model that would paint the picture here, or what was added to it, is another."""
        if self.model_hash and here.model_hash and self.model_hash != here.model_hash:
            raise ValueError(
                f"the picture was painted by model '{self.model}' of hash {self.model_hash[:12]}, "
                f"and this is '{here.model}' of hash {here.model_hash[:12]}; load the one it was painted by"
            )
        if "adapters" in self.differences(here):
            wanted, has = (", ".join(map(str, each.adapters)) or "none" for each in (self, here))
            raise ValueError(f"the picture was painted with other adapters: {wanted}; here are {has}; load those")

    def differences(self, here: Record) -> list[str]:
        """What of all that a picture comes by is, or may be, another here, by the words that a model is loaded with."""
        own, others = self.compute.to_json(), here.compute.to_json()
        same = {
            "model": self.model_hash == here.model_hash != "",  # of one without files nobody can tell
            "clip": self.clip_hash == here.clip_hash,
            "weak_unet": self.weak_unet_hash == here.weak_unet_hash,
            "adapters": len(self.adapters) == len(here.adapters)
            and all(map(Adapter.is_same, self.adapters, here.adapters)),
            **{name: own[name] == others[name] for name in ("dtype", "runtime")},
        }
        return [name for name, is_same in same.items() if not is_same]

    def check_beside(self, here: Record) -> None:
        """ValueError where the networks that are asked beside the model are others.

        A warning where they are computed otherwise, which may change pixels.
        """
        if self.asks_weak and self.weak_unet_hash != here.weak_unet_hash:
            raise ValueError(f"the picture was guided by another weak_unet than '{here.weak_unet}'; load that one")
        if self.asks_clip:
            self._check_clip(here)
        computed = here.compute.to_json()
        for name, made in self.compute.to_json().items():
            if made != computed[name]:
                warnings.warn(f"the picture was painted with {name} {made}, and this is {computed[name]}", stacklevel=3)

    def _check_clip(self, here: Record) -> None:
        if self.clip and not self.clip_hash:
            raise ValueError(f"the record names CLIP '{self.clip}' and has no clip_hash, so none can be told to be it")
        if self.clip_hash != here.clip_hash:
            painter = f"CLIP '{self.clip}' of hash {self.clip_hash[:12]}" if self.clip_hash else "the model's own CLIP"
            own = f"'{here.clip}' of hash {here.clip_hash[:12]}" if here.clip else "the model's own"
            raise ValueError(f"the picture was painted by {painter}, and this is {own}; load the one it was painted by")


TEXTS = tuple(item.name for item in fields(Record) if item.type == "str")
OURS = {*TEXTS, "version", "adapters", "dtype", "attention", "runtime", "score"}


def damaged(name: str, value: object) -> ValueError:
    """What is said of a record with a value that it cannot have."""
    return ValueError(f"the record is damaged: its {name} is {value!r}")
