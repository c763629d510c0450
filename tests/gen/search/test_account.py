"""What a search takes: as many evaluations, decodes and scores as it says, and nothing once its request is done."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gen import TextToImage
from gen.engine import Engine
from gen.search import Draft, Halving
from tests.engines import altered, buckets_of, run
from tests.gen.search.asked import ASKED, CHOOSING, MAKING, Counted


@pytest.mark.parametrize("name", [*CHOOSING, *MAKING])
def test_the_account_is_exact(counted: Counted, name: str) -> None:
    account = counted.model.paint([(CHOOSING | MAKING)[name]])[0].account
    seen = counted.seen
    assert account.evaluations == {"prior": seen["prior"], "decoder": seen["call"], "super_resolution": 0}
    assert (account.decodes, account.previews) == (seen["decode"], seen["preview"])
    assert account.scores == seen["score"] == account.decodes + account.previews
    assert (account.previews > 0) == (name.startswith("large"))


def test_what_each_takes_by_the_book(tiny: TextToImage) -> None:
    """8 candidates of 10 steps, guided: two evaluations a step."""
    one = replace(ASKED, prompt="a star", seed=3, prior=False)
    asked = Halving(rungs=(0.3, 0.5, 0.7)), Draft(steps=0.25)
    halving, draft = (tiny.paint([replace(one, search=search)])[0].account for search in asked)
    # rungs at 3, 5 and 7: 8 candidates take 3 steps, 4 two more, 2 the last five; at the last rung nobody is left over
    assert halving.evaluations["decoder"] == 2 * (8 * 3 + 4 * 2 + 2 * 5)
    assert (halving.decodes, halving.scores) == (8 + 4 + 2,) * 2
    # three are painted where two are kept
    assert draft.evaluations["decoder"] == 2 * (8 * 2 + 3 * 10)
    assert (draft.decodes, draft.scores) == (8 + 3,) * 2
    zero = tiny.paint([replace(one, search="zero_order")])[0].account
    assert (zero.evaluations["decoder"], zero.decodes, zero.scores) == (2 * 8 * 10, 8, 8)


def test_when_memory_runs_out_over_previews_fewer_are_looked_at_at_once(tiny: TextToImage) -> None:
    asked = replace(ASKED, prompt="a star", seed=3, prior=False, search=Halving(rungs=(0.3,)))
    sizes: list[int] = []

    def short(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tiny.model.decode(latents)

    ours, theirs = altered(tiny, decode=short).paint([asked])[0], tiny.paint([asked])[0]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]  # eight previews, four pictures
    assert ours.seeds == theirs.seeds and vars(ours.account) == vars(theirs.account)


def test_a_draft_asks_the_prior_once(tiny: TextToImage) -> None:
    plain, draft = (tiny.paint([replace(ASKED, prior=True, search=name)])[0].account for name in ("best_of", "draft"))
    assert draft.evaluations["prior"] == plain.evaluations["prior"] > 0


def test_the_places_of_those_given_up_are_taken_at_the_next_step(tiny: TextToImage) -> None:
    engine = Engine(tiny.model, tiny._result, max_rows=8, buckets=buckets_of(64))  # room for all
    one = replace(ASKED, prompt="a star", seed=0, prior=False)
    engine.submit(replace(one, search=Halving(rungs=(0.3,))))
    engine.submit(replace(one, seed=100, rerank=False, keep=None))
    seeds = []
    while engine.tick():
        seeds.append({live.row.seed for live in engine._stages.rows["decoder"].live})
    assert [len(each) for each in seeds[:4]] == [8, 8, 4, 8]  # three steps, the last of which gives four up
    assert all(seed < 100 for seed in seeds[1]) and sum(seed >= 100 for seed in seeds[3]) == 4


def test_a_request_with_a_search_is_held_by_nobody_once_it_is_done(tiny: TextToImage) -> None:
    """Without the garbage collector, however it ends; so its latents are gone with it."""
    engine = tiny.engine()
    gc.collect()
    gc.disable()
    try:
        futures = [engine.submit(request) for request in [*CHOOSING.values(), *MAKING.values()]]
        futures.append(engine.submit(replace(ASKED, search="halving", num_inference_steps=900)))
        flights = [weakref.ref(flight) for flight in engine._unsettled.values()]
        for _ in range(8):
            engine.tick()
        futures[-1].cancel()
        run(engine)
        assert all(future.done() for future in futures)
        assert [flight() for flight in flights] == [None] * len(flights)
    finally:
        gc.enable()
