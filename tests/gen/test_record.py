"""Records: what is written is read again, and what is damaged or of a version to come is refused by what is wrong."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from gen.adapters.file import Adapter
from gen.origins import Origins
from gen.record import READ, VERSION, Record
from gen.runtime import Compute

PICTURE: dict[str, Any] = {"prompt": "a star", "seed": 3, "settings": {"num_inference_steps": 4}}
FULL = Record(
    picture=PICTURE | {"noise_path": [{"seed": 1, "steps": 2, "share": 0.0}]},
    model="some/model",
    model_hash="0" * 64,
    weak_unet="weak",
    weak_unet_hash="1" * 64,
    clip="open_clip:ViT-B-32/openai",
    clip_hash="2" * 64,
    config="folder",
    prior_model="some/prior",
    adapters=(Adapter("lora", "a.safetensors", "3" * 64, scale=0.5),),
    compute=Compute(torch.bfloat16, "openvino", "math"),
)


@pytest.mark.parametrize(
    "record", [FULL, *(Record(picture=PICTURE, compute=Compute(dtype)) for dtype in READ.values())]
)
def test_what_is_written_is_read_again(record: Record) -> None:
    written = json.loads(json.dumps(record.to_json() | {"score": 0.3}))
    assert Record.from_json(written) == record
    assert written["version"] == VERSION == 1


def test_a_record_says_nothing_of_what_was_not_there() -> None:
    written = Record(picture=PICTURE, model="shapes64").to_json()
    assert list(written) == [*PICTURE, "version", "model", "model_hash", "dtype", "attention", "runtime"]
    assert Record.from_json(PICTURE).compute == Compute(torch.float32, "torch", "auto")  # as records of old


def test_a_clip_that_only_ranked_is_not_asked_for() -> None:
    assert FULL.origins == Origins(
        name_or_path="some/model", config="folder", prior_model="some/prior", weak_unet="weak"
    )
    for more in ({"variation_of": {}}, {"settings": {"clip_guidance_scale": 2.0}}):
        assert Record(picture=PICTURE | more, clip="a").origins.clip == "a"
        assert Record(picture=PICTURE | more).origins.clip is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(({name: 3}, f"is damaged: its {name} is 3$") for name in ("model", "model_hash", "weak_unet", "clip_hash")),
        *(({name: []}, rf"is damaged: its {name} is \[\]$") for name in ("runtime", "attention", "settings", "dtype")),
        ({"dtype": "int3"}, "is damaged: its dtype is 'int3'; ours are: float32, bfloat16, float16"),
        ({"adapters": {}}, r"is damaged: its adapters are \{\}"),
        ({"adapters": [{"kind": "lora"}]}, "is damaged: its adapters have {'kind': 'lora'}"),
        ({"version": VERSION + 1}, "is of version 2, and here 1 is the last; use a newer unclip"),
        *(({"version": version}, "is damaged: its version is") for version in (0, "1", None)),
    ],
)
def test_what_is_wrong_is_named(damage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^the record {message}"):
        Record.from_json(FULL.to_json() | damage)


ASKING = replace(FULL, picture=PICTURE | {"settings": {"clip_guidance_scale": 2.0, "guidance_rule": "autoguidance"}})


def test_what_paints_the_same_is_known_by_its_hashes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASKING.check_model(replace(ASKING, model="elsewhere"))
        ASKING.check_beside(replace(ASKING, clip="elsewhere", weak_unet="elsewhere"))
        FULL.check_beside(replace(FULL, clip_hash="", weak_unet_hash=""))  # which it does not ask


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"model_hash": "9" * 64}, "by model 'some/model' of hash 0{12}, and this is 'some/model' of hash 9{12}; load"),
        ({"adapters": ()}, "other adapters: lora 'a.safetensors' x 0.5 .*; here are none; load those"),
        ({"weak_unet_hash": ""}, "guided by another weak_unet than 'weak'; load that one"),
        (
            {"clip_hash": "9" * 64},
            "by CLIP 'open_clip:.*' of hash 2{12}, and this is 'open_clip:.*' of hash 9{12}; load",
        ),
        ({"clip": "", "clip_hash": ""}, "by CLIP 'open_clip:.*' of hash 2{12}, and this is the model's own; load"),
    ],
)
def test_what_paints_otherwise_is_refused(here: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASKING.check_model(replace(ASKING, **here))
        ASKING.check_beside(replace(ASKING, **here))


def test_what_computes_otherwise_is_told() -> None:
    with pytest.warns(UserWarning, match="painted with runtime openvino, and this is torch"):
        FULL.check_beside(replace(FULL, compute=replace(FULL.compute, runtime="torch")))
