"""Rows: a picture is of (model, prompt, seed, settings) and of nothing else that is painted beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from gen import Request, TextToImage
from gen.conditioning import Table
from gen.engine import Engine, Lane, Live, Row
from gen.request import Candidate, Settings
from gen.scheduler import STOCK
from samplers.noise import NoiseStream, noise
from tests.tiny import WIDTH

LEVEL = 1 / 255  # one 8-bit level
PLAIN = Request(prompt="a small red circle", seed=7, rerank=False, output_type="pt")

# Neighbours of every kind: other words, seeds, lengths, guidance, samplers, noise, sizes and no prior.
OTHERS = [
    replace(PLAIN, prompt="a large blue square", seed=1),
    replace(PLAIN, guidance_scale=1.0, num_inference_steps=7),
    replace(PLAIN, guidance_scale=7.5, num_inference_steps=2, negative_prompt="a star"),
    replace(PLAIN, sampler="heun", num_inference_steps=3),
    replace(PLAIN, eta=0.7, noise_level=300, prior_guidance_scale=4.0),
    replace(PLAIN, prior=False, guidance_rescale=0.7),
    replace(PLAIN, height=32, width=96, guidance_interval=(0.5, 5.0)),
    replace(PLAIN, sampler="dpmpp_2m_sde", num_inference_steps=5, prior_num_inference_steps=6),
]


@pytest.mark.parametrize("subject", range(len(OTHERS)))
def test_a_picture_does_not_depend_on_its_batch(tiny: TextToImage, subject: int) -> None:
    """Alone, then at every slot among neighbours of every kind, at several batch sizes."""
    request = OTHERS[subject]
    alone = tiny.paint([request])[0].images
    neighbours = [other for other in OTHERS if other is not request]
    for slot in (0, 3, len(neighbours)):
        batch = [*neighbours[:slot], request, *neighbours[slot:]]
        for batch_size in (None, 1, 3):
            together = tiny.paint(batch, batch_size=batch_size)[slot].images
            assert (together - alone).abs().max() <= LEVEL
    assert tiny.paint([replace(request, seed=8)])[0].images.sub(alone).abs().max() > LEVEL


@pytest.mark.parametrize("size", [2, 5, 16])
def test_every_slot_of_one_prompt(tiny: TextToImage, size: int) -> None:
    many = tiny("a small red circle", num_images_per_prompt=size, seed=20, rerank=False, output_type="pt")
    assert many.seeds == list(range(20, 20 + size))
    for slot, seed in enumerate(many.seeds):
        alone = tiny("a small red circle", seed=seed, rerank=False, output_type="pt").images[0]
        assert (alone - many.images[slot]).abs().max() <= LEVEL


def test_every_prompt_of_a_list_starts_again(tiny: TextToImage) -> None:
    words = ["a red star", "a blue star"]
    both = tiny(words, num_images_per_prompt=2, seed=5, rerank=False, output_type="pt")
    assert both.seeds == [5, 6, 5, 6] and both.prompts == [words[0]] * 2 + [words[1]] * 2
    second = tiny(words[1], num_images_per_prompt=2, seed=5, rerank=False, output_type="pt")
    assert (both.images[2:] - second.images).abs().max() <= LEVEL
    own = tiny(words, num_images_per_prompt=2, seed=[9, 5], rerank=False, output_type="pt")
    assert own.seeds == [9, 10, 5, 6]
    assert (own.images[2:] - second.images).abs().max() <= LEVEL


# --- the engine itself -----------------------------------------------------------------------------------------


def rows_of(model: TextToImage, count: int, **settings: Any) -> tuple[list[Row], Table]:
    defaults = replace(model.model.abilities.defaults, prior=False, **settings)
    table, words = Table(), ["a red circle", "a star above a square"]
    candidates = [Candidate(prompt=words[k % 2], seed=k, settings=vary(defaults, k)) for k in range(count)]
    told = model.model.tell(candidates, table)
    rows = []
    for key, (candidate, (prompt, null)) in enumerate(zip(candidates, told, strict=True)):
        schedule = model.model.levels.schedule(candidate.settings.sampler, candidate.settings.num_inference_steps)
        scale = candidate.settings.guidance_scale
        rows.append(Row(key, candidate.seed, schedule, candidate.settings.sampler, prompt, null, scale, eta=None))
    return rows, table


def vary(settings: Settings, k: int) -> Settings:
    return replace(settings, num_inference_steps=6 + k % 3, guidance_scale=[3.0, 1.0, 5.0][k % 3])


def engine_of(model: TextToImage, table: Table) -> Engine:
    shape = model.model.latent_shape(model.model.abilities.defaults)
    return Engine(model.model.call, model.model.levels.scaling, table, "decoder", lambda _: shape)


@torch.no_grad()
def finish(engine: Engine, **plan: Any) -> dict[int, Tensor]:
    return {one.row.key: one.x for finished in engine.run(**plan) for one in finished}


@pytest.mark.parametrize("sampler", sorted(STOCK))
def test_dropping_rows_never_changes_the_others(tiny: TextToImage, sampler: str) -> None:
    rows, table = rows_of(tiny, 7, sampler=sampler)
    whole = finish(engine_of(tiny, table), rows=rows)
    engine, left = engine_of(tiny, table), {}
    with torch.no_grad():
        for tick, finished in enumerate(engine.run(rows)):
            left |= {one.row.key: one.x for one in finished}
            engine.drop({1: {1, 4}, 2: {0}, 4: {6}}.get(tick, set()))
    assert sorted(left) == [2, 3, 5]
    for key, x in left.items():
        assert (x - whole[key]).abs().max() < 1e-4 * whole[key].abs().max().clamp(min=1)


@pytest.mark.parametrize("sampler", sorted(STOCK))
def test_rows_admitted_late_or_one_by_one_are_the_same(tiny: TextToImage, sampler: str) -> None:
    rows, table = rows_of(tiny, 5, sampler=sampler)
    whole = finish(engine_of(tiny, table), rows=rows)
    for max_rows in (1, 2, 4):
        for key, x in finish(engine_of(tiny, table), rows=rows, max_rows=max_rows).items():
            assert (x - whole[key]).abs().max() < 1e-4 * whole[key].abs().max().clamp(min=1)
    late, found = engine_of(tiny, table), {}
    with torch.no_grad():
        late.admit(rows[:2])
        late.tick()
        late.admit(rows[2:])  # in the middle of the others' run
        while late.lanes:
            found |= {one.row.key: one.x for one in late.tick()}
    for key, x in found.items():
        assert (x - whole[key]).abs().max() < 1e-4 * whole[key].abs().max().clamp(min=1)
    assert sorted(found) == sorted(whole)


@pytest.mark.parametrize("sampler", sorted(STOCK))
def test_going_on_from_step_k_equals_never_stopping(tiny: TextToImage, sampler: str) -> None:
    """What a row is after k steps is its tensors and its count: a fresh engine with fresh streams goes on."""
    rows, table = rows_of(tiny, 4, sampler=sampler)
    whole = finish(engine_of(tiny, table), rows=rows)
    first, second = engine_of(tiny, table), engine_of(tiny, table)
    with torch.no_grad():
        first.admit(rows)
        for _ in range(3):
            first.tick()
        for key, lane in first.lanes.items():
            fresh = [
                Live(one.row, NoiseStream([one.row.seed], "decoder", one.stream.shape), one.eta, one.index)
                for one in lane.rows
            ]
            second.lanes[key] = Lane(lane.sampler, fresh, lane.state)
        found = finish(second, rows=[])
    assert sorted(found) == sorted(whole)
    for key, x in found.items():
        assert torch.equal(x, whole[key])


@pytest.mark.parametrize("factor", [0.4, 1.0])
def test_guidance_rescale_is_diffusers(tiny: TextToImage, factor: float) -> None:
    """By hand with the stock scheduler and diffusers' own rescale_noise_cfg, of the raw output (v here)."""
    model, scale = tiny.model, 6.0
    asked: dict[str, Any] = {"seed": 3, "prior": False, "rerank": False, "output_type": "latent"}
    asked |= {"num_inference_steps": 5, "guidance_scale": scale}
    ours = tiny("a star", guidance_rescale=factor, **asked).images
    scheduler = DDIMScheduler.from_config(model.levels.stock.config)
    scheduler.set_timesteps(5)
    x, none = noise([3], "decoder", 0, (4, 8, 8)), torch.zeros(1, 2 * WIDTH)
    with torch.no_grad():
        words, null = model.text(["a star"]).tokens, model.text([""]).tokens
        for t in scheduler.timesteps:
            prompt = model.unet(x, t, words, class_labels=none).sample
            away = model.unet(x, t, null, class_labels=none).sample
            guided = rescale_noise_cfg(away + scale * (prompt - away), prompt, factor)
            x = scheduler.step(guided, t, x).prev_sample
    assert (ours - x).abs().max() < 1e-4
    assert (ours - tiny("a star", **asked).images).abs().max() > 1e-2


def test_a_tick_asks_the_network_once_for_all_rows(tiny: TextToImage) -> None:
    """Rows of two prompts, at three lengths and guidances, share one call; an unguided row is asked about once."""
    rows, table = rows_of(tiny, 6)
    calls: list[int] = []
    engine = engine_of(tiny, table)
    network = engine.network

    def counted(x: Tensor, timestep: Tensor, told: Any) -> Tensor:
        calls.append(len(x))
        return network(x, timestep, told)

    engine.network = counted
    with torch.no_grad():
        engine.admit(rows)
        engine.tick()
    assert calls == [2 + 1 + 2 + 2 + 1 + 2]
    # two prompts and one null: what is the same is told once
    assert len(table.conditions) == 3


def test_guidance_outside_its_interval_costs_nothing(tiny: TextToImage) -> None:
    rows, table = rows_of(tiny, 1)
    row = replace(rows[0], guidance_scale=4.0)
    sigmas = row.schedule.sigmas
    middle = (sigmas[4].item(), sigmas[2].item() * 1.001)  # guided at levels 2 and 3
    asked: dict[str, list[int]] = {}
    for name, interval in (("everywhere", None), ("middle", middle), ("nowhere", (0.0, 1e-9))):
        engine = engine_of(tiny, table)
        network, counts = engine.network, asked.setdefault(name, [])

        def counted(x: Tensor, t: Tensor, told: Any, network: Any = network, counts: Any = counts) -> Tensor:
            counts.append(len(x))
            return network(x, t, told)

        engine.network = counted
        found = finish(engine, rows=[replace(row, guidance_interval=interval)])
        if name == "nowhere":
            off = finish(engine_of(tiny, table), rows=[replace(row, guidance_scale=1.0)])
            assert torch.equal(found[0], off[0])
    assert asked["everywhere"] == [2] * 6
    assert asked["middle"] == [1, 2, 2, 2, 1, 1]  # level 1 only touches the interval's end, as Heun would
    assert asked["nowhere"] == [1] * 6
