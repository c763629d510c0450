"""A record holds what a picture was painted from, and says what it lacks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gen import Request, TextToImage
from gen.candidate import Candidate
from gen.resolve import resolve


def test_settings_go_through_json(tiny: TextToImage) -> None:
    abilities = tiny.model.abilities
    job = resolve(Request(prompt="a star", seed=3, guidance_interval=(0.1, 2.0), sampler="heun"), abilities)
    (candidate,) = job.candidates
    again = Candidate.from_json(json.loads(json.dumps(candidate.to_json())), abilities)
    assert (again.prompt, again.seed, again.settings) == ("a star", 3, candidate.settings)
    assert isinstance(again.settings.guidance_interval, tuple)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": None}, "seed=None"),
        ({"settings": {"sampler": "no"}}, "sampler 'no' is unknown"),
        ({"settings": {"stepz": 3}}, "record: setting 'stepz' is unknown; choose from: height"),
        ({"settings": 3}, "settings no object"),
        ({"prompt": 3}, "prompt is no text"),
        ({"given": ["latents"]}, re.escape("painted from tensors (latents)")),
    ],
)
def test_damaged_records(tiny: TextToImage, change: dict[str, Any], message: str) -> None:
    record = resolve(Request(prompt="a star", seed=3), tiny.model.abilities).candidates[0].to_json()
    with pytest.raises(ValueError, match=message):
        Candidate.from_json(record | change, tiny.model.abilities)
    with pytest.raises(ValueError, match="the record has no 'prompt'"):
        Candidate.from_json({}, tiny.model.abilities)
