"""Searches say which candidates go on and never what their pixels are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gen import TextToImage
from tests.engines import run
from tests.gen.search.asked import ASKED, CHOOSING, MAKING
from tests.pictures import LEVEL


@pytest.fixture(scope="module")
def plain(tiny: TextToImage) -> dict[int, Tensor]:
    """Every candidate's picture, by its seed; all are painted and kept."""
    result = tiny.paint([replace(ASKED, keep=None)])[0]
    return dict(zip(result.seeds, result.images, strict=True))


@pytest.mark.parametrize("name", ["halving", "draft", "racing"])
def test_a_candidate_that_goes_on_looks_as_if_there_were_no_search(
    tiny: TextToImage, plain: dict[int, Tensor], name: str
) -> None:
    result = tiny.paint([CHOOSING[name]])[0]
    assert len(result.images) == 2 * (CHOOSING[name].keep or 0)
    assert 0 < sum(each.painted for each in result.candidates) < 16
    for seed, image in zip(result.seeds, result.images, strict=True):
        assert (image - plain[seed]).abs().max() <= LEVEL
    assert not torch.allclose(plain[5], plain[6], atol=LEVEL)


@pytest.mark.parametrize("name", [*CHOOSING, *MAKING])
def test_a_search_does_not_notice_what_else_runs(tiny: TextToImage, name: str) -> None:
    """Alone with all rows in one batch, and beside others with three rows in flight: the same pictures come of it."""
    request = (CHOOSING | MAKING)[name]
    alone = tiny.paint([request])[0]
    engine = tiny.engine(max_rows=3)
    others = [engine.submit(replace(ASKED, seed=99, num_inference_steps=4)), engine.submit(CHOOSING["draft"])]
    future = engine.submit(request)
    run(engine)
    crowded = future.result(timeout=0)
    assert all(other.done() for other in others)
    assert [each.painted for each in crowded.candidates] == [each.painted for each in alone.candidates]
    assert crowded.seeds == alone.seeds and vars(crowded.account) == vars(alone.account)
    assert (crowded.images - alone.images).abs().max() <= LEVEL
    assert [record.get("noise_path") for record in crowded.records] == [r.get("noise_path") for r in alone.records]


@pytest.mark.parametrize("name", [*CHOOSING, *MAKING])
def test_every_record_paints_its_picture_again(tiny: TextToImage, name: str) -> None:
    result = tiny.paint([replace((CHOOSING | MAKING)[name], keep=7 if name in MAKING else 2)])[0]
    for image, record in zip(result.images, result.records, strict=True):
        assert (tiny.repaint(json.loads(json.dumps(record))) - image).abs().max() <= LEVEL
