"""Rows: a picture is of (model, prompt, seed, settings) and of nothing else that is painted beside it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gen import Request, TextToImage
from gen.bucket import PROBE, UNBOUNDED
from gen.candidate import Candidate
from gen.conditioning import Conditions, Table
from gen.dispatch import dispatched
from gen.lane import Lane, LevelTable
from gen.row import Live, Row
from gen.rows import Rows
from gen.scheduler import STOCK
from gen.settings import Settings
from samplers.guidance import Guide
from samplers.noise import noise
from samplers.sample import advance, start
from samplers.scaling import denoiser
from samplers.state import Prediction, State
from tests.engines import buckets_of, rows_over
from tests.pictures import LEVEL
from tests.tiny import WIDTH

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


# --- rows over one network ---------------------------------------------------------------------------------------


def rows_of(model: TextToImage, count: int, **settings: Any) -> list[Row]:
    defaults = replace(model.model.abilities.defaults, prior=False, **settings)
    words, levels = ["a red circle", "a star above a square"], model.model.levels
    candidates = [Candidate(prompt=words[k % 2], seed=k, settings=vary(defaults, k)) for k in range(count)]
    return [
        Row(
            key=key,
            seed=one.seed,
            shape=model.model.latent_shape(one.settings),
            schedule=levels.schedule(one.settings.sampler, one.settings.num_inference_steps),
            sampler=one.settings.sampler,
            prompt=prompt,
            null=null,
            guidance_scale=one.settings.guidance_scale,
        )
        for key, (one, (prompt, null)) in enumerate(
            zip(candidates, model.model.encode_prompts(candidates, Table()), strict=True)
        )
    ]


def vary(settings: Settings, k: int) -> Settings:
    return replace(settings, num_inference_steps=6 + k % 3, guidance_scale=[3.0, 1.0, 5.0][k % 3])


def counting(rows: Rows) -> list[int]:
    """How many evaluations each network call makes, from now on."""
    network, counts = rows.network, list[int]()

    def counted(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        counts.append(len(x))
        return network(x, timestep, conditions)

    rows.network = counted
    return counts


@torch.no_grad()
def finish(together: Rows, rows: list[Row], max_rows: int | None = None) -> dict[Any, Tensor]:
    return {one.row.key: one.x for finished in together.run(rows, max_rows) for one in finished}


def same(found: dict[Any, Tensor], whole: dict[Any, Tensor]) -> bool:
    return all((x - whole[key]).abs().max() < 1e-4 * whole[key].abs().max().clamp(min=1) for key, x in found.items())


@pytest.mark.parametrize("sampler", sorted(STOCK))
def test_dropping_rows_never_changes_the_others(tiny: TextToImage, sampler: str) -> None:
    rows = rows_of(tiny, 7, sampler=sampler)
    whole = finish(rows_over(tiny), rows)
    together, left = rows_over(tiny), {}
    with torch.no_grad():
        for tick, finished in enumerate(together.run(rows)):
            left |= {one.row.key: one.x for one in finished}
            together.drop({1: {1, 4}, 2: {0}, 4: {6}}.get(tick, set()))
    assert sorted(left) == [2, 3, 5] and same(left, whole)


@pytest.mark.parametrize("sampler", sorted(STOCK))
def test_rows_admitted_late_or_one_by_one_are_the_same(tiny: TextToImage, sampler: str) -> None:
    rows = rows_of(tiny, 5, sampler=sampler)
    whole = finish(rows_over(tiny), rows)
    for max_rows in (1, 2, 4):
        assert same(finish(rows_over(tiny), rows, max_rows), whole)
    late, found = rows_over(tiny), {}
    with torch.no_grad():
        late.admit(rows[:2])
        late.tick()
        late.admit(rows[2:])  # in the middle of the others' run
        while late.lanes:
            found |= {one.row.key: one.x for one in late.tick().finished}
    assert sorted(found) == sorted(whole) and same(found, whole)


@pytest.mark.parametrize("sampler", sorted(STOCK))
def test_going_on_from_step_k_equals_never_stopping(tiny: TextToImage, sampler: str) -> None:
    """What a row is after k steps is its tensors and its count: fresh rows with fresh streams go on."""
    rows = rows_of(tiny, 4, sampler=sampler)
    whole = finish(rows_over(tiny), rows)
    first, second = rows_over(tiny), rows_over(tiny)
    with torch.no_grad():
        first.admit(rows)
        for _ in range(3):
            first.tick()
        for key, lane in first.lanes.items():
            fresh = [replace(Live.of(one.row, "decoder"), index=one.index) for one in lane.rows]
            second.join(
                key,
                Lane(lane.sampler, fresh, lane.state, LevelTable.of(fresh, second.scaling, second.device), lane.bucket),
            )
        found = finish(second, [])
    assert sorted(found) == sorted(whole)
    for key, x in found.items():
        assert torch.equal(x, whole[key])


def assert_told_of_their_own(over: Rows) -> None:
    """Every row is told the levels of its own schedule, and how the network is asked there, to the last bit."""
    for lane in over.lanes.values():
        for slot, one in enumerate(lane.rows):
            for index, found in enumerate(lane.table.step, one.index):
                sigma = one.row.schedule.sigmas[index].float()
                assert found.level.sigma[slot] == sigma
                assert found.level.index[slot] == index
                assert found.level.steps_left[slot] == one.row.schedule.last - index
                alone = over.scaling.preconditioning(sigma[None]).values[:, 0]
                assert torch.equal(found.preconditioning.values[:, slot], alone)


def test_rows_that_come_and_go_are_told_of_their_own_levels(tiny: TextToImage) -> None:
    """Of schedules of several lengths and beginnings, as they join, end, halt, come back and are put apart."""
    schedules = [tiny.model.levels.schedule("ddim", steps) for steps in (2, 5, 3, 9)]
    schedules[1] = replace(schedules[1], first=1)
    rows = [replace(row, schedule=each) for row, each in zip(rows_of(tiny, 4), schedules, strict=True)]
    over = rows_over(tiny)
    with torch.no_grad():
        for row in rows:
            over.admit([row])
            assert_told_of_their_own(over)
            over.tick()
        halted = over.halt({rows[3].key})
        over.admit([replace(rows[0], key="late")])
        over.tick()
        over.resume(halted.values())
        assert_told_of_their_own(over)
        over._put_apart(list(over.lanes.values()))
        assert len(over.lanes) == 2
        assert_told_of_their_own(over)
        over.tick()
        assert_told_of_their_own(over)


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


@pytest.mark.parametrize("size", [1, 64])
def test_a_learned_variance_is_the_prompts_own(tiny: TextToImage, size: int) -> None:
    """A network that says twice its channels, by hand: guidance moves the estimate and leaves the variance."""
    model, scale = tiny.model, 3.0
    scaling = replace(model.levels.scaling, learned_range=True)

    def network(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        output = model.call(x, timestep, conditions)
        return torch.cat([output, output.tanh()], dim=1)

    (row,) = (replace(row, sampler="unclip", guidance_scale=scale, options={}) for row in rows_of(tiny, 1))
    together = Rows(network, scaling, "decoder", buckets=buckets_of(size))
    ours = finish(together, [row])[0]
    assert row.null is not None
    gathered, estimate = Conditions((row.null, row.prompt)), denoiser(lambda x, t: network(x, t, gathered), scaling)

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        both = estimate(x.expand(2, -1, -1, -1), sigma.expand(2))
        assert both.variance is not None
        return Prediction((1 - scale) * both.x0[:1] + scale * both.x0[1:], both.variance[1:])

    state = start("unclip", noise([0], "decoder", 0, row.shape), torch.tensor([row.schedule.start_scale]))
    with torch.no_grad():
        for step in range(row.schedule.num_steps):
            now, then = (row.schedule.level(torch.tensor([index])) for index in (step, step + 1))
            state = advance("unclip", denoise, state, now, then, noise([0], "decoder", step + 1, row.shape))
    assert (ours - state.x[0] * row.schedule.end_scale).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)
    plain = finish(rows_over(tiny), [row])[0]
    assert (ours - plain).abs().max() > 1e-2


def test_a_tick_asks_the_network_once_for_all_rows(tiny: TextToImage) -> None:
    """Rows of two prompts, at three lengths and guidances, share one call; an unguided row is asked about once."""
    rows = rows_of(tiny, 6)
    together = rows_over(tiny)
    calls = counting(together)
    with torch.no_grad():
        together.admit(rows)
        (taken,) = together.tick().taken
        together.tick()
    assert taken.evaluations == [2, 1, 2, 2, 1, 2]
    assert calls == [PROBE, 10, 10]  # the first of all is measured, and its answer thrown away
    # two prompts and one null: what is the same is told once
    assert len({condition for row in rows for condition in (row.prompt, row.null)} - {None}) == 3


def test_another_network_answers_a_rows_last_step(tiny: TextToImage) -> None:
    """Rows of 6, 7 and 8 steps beside each other; each asks the other network once, and ends where it says."""
    model, rows = tiny.model, [replace(row, guidance_scale=1.0, null=None, sampler="ddim") for row in rows_of(tiny, 3)]
    asked: list[int] = []

    def other(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        asked.append(len(x))
        return -model.call(x, timestep, Conditions(tuple(replace(each, network="own") for each in conditions.each)))

    def network(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return dispatched({"own": model.call, "last": other}, x, timestep, conditions)

    turned = [replace(row, last=replace(row.prompt, network="last")) for row in rows]
    ours = finish(Rows(network, model.levels.scaling, "decoder"), turned)
    assert asked == [1, 1, 1]
    for row in rows:
        together = rows_over(tiny)
        with torch.no_grad():
            together.admit([row])
            for _ in range(row.schedule.num_steps - 1):
                together.tick()
            (lane,) = together.lanes.values()
            now, before = lane.table.step[0].level.sigma, lane.state.x
            gathered = Conditions((row.prompt,))
            estimate = denoiser(lambda x, t, gathered=gathered: -model.call(x, t, gathered), together.scaling)(
                before, now
            ).x0
        # a step of DDIM to level 0 ends at the estimate
        assert (ours[row.key] - estimate[0]).abs().max() < 1e-4 * estimate.abs().max()


def test_what_several_networks_are_told_is_put_together_once(tiny: TextToImage) -> None:
    """Each is told the same object at every step, by which it finds what it keeps of a call."""
    rows = [
        replace(
            row, null=replace(row.prompt, network="weak"), guidance_scale=3.0, schedule=rows_of(tiny, 1)[0].schedule
        )
        for row in rows_of(tiny, 3)
    ]
    asked: dict[str, list[Conditions]] = {"own": [], "weak": []}

    def network(name: str, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        asked[name].append(conditions)
        return tiny.model.call_unet(tiny.model.unet, x, timestep, conditions)

    networks = {name: partial(network, name) for name in asked}
    together = Rows(partial(dispatched, networks), tiny.model.levels.scaling, "decoder", buckets=buckets_of(16))
    finish(together, rows)
    for name, each in asked.items():
        assert len(each) == 6 and all(one is each[0] for one in each)
        assert [condition.network for condition in each[0].each] == [name] * 3


def test_rows_of_several_samplers_share_calls(tiny: TextToImage) -> None:
    """One call for all of them, and one more for those that ask twice; each as it is by itself."""
    samplers = ["ddim", "heun", "dpmpp_2m_sde", "heun", "ddim"]
    rows = [replace(rows_of(tiny, 5, sampler=name)[key], key=key) for key, name in enumerate(samplers)]
    whole = {key: x for row in rows for key, x in finish(rows_over(tiny), [row]).items()}
    together = rows_over(tiny)
    calls = counting(together)
    with torch.no_grad():
        together.admit(rows)
        taken = together.tick().taken
    assert calls == [PROBE, 2 + 1 + 2 + 2 + 1, 1 + 2]
    assert sorted(len(each.rows) for each in taken) == [1, 2, 2]
    assert {one.row.key: count for each in taken for one, count in zip(each.rows, each.evaluations, strict=True)} == {
        0: 2,
        1: 2,
        2: 2,
        3: 4,
        4: 1,
    }
    assert same(finish(together, []), whole)


@pytest.mark.parametrize("seed", range(5))
def test_rows_join_and_leave_at_random(tiny: TextToImage, seed: int) -> None:
    """Rows of any sampler and settings are admitted, dropped, halted and resumed at any tick, at any bucket."""
    draw, rows, base = random.Random(seed), list[Row](), rows_of(tiny, 2)
    for key in range(9):
        sampler, row = draw.choice(sorted(STOCK)), draw.choice(base)
        steps, scale = draw.randint(1, 6), draw.choice([1.0, 2.0, 6.0])
        rows.append(
            replace(
                row,
                key=key,
                seed=draw.randrange(1000),
                sampler=sampler,
                schedule=tiny.model.levels.schedule(sampler, steps),
                null=base[0].null,
                guidance_scale=scale,
                guidance_rescale=draw.choice([0.0, 0.5]),
                guidance_interval=draw.choice([None, (0.5, 5.0)]),
                guide=Guide(rule=draw.choice(["cfg", "apg", "cfg_zero"])),
                thresholding=draw.choice([None, (0.9, 1.0)]),
            )
        )
    whole = {key: x for row in rows for key, x in finish(rows_over(tiny), [row]).items()}
    together = rows_over(tiny, draw.choice([None, buckets_of(3)]))
    waiting, halted, dropped, found = list(rows), dict[Any, Lane](), set[Any](), dict[Any, Tensor]()
    with torch.no_grad():
        while waiting or halted or together.lanes:
            together.admit([waiting.pop() for _ in range(min(draw.choice([0, 1, 3]), len(waiting)))])
            together.resume([halted.pop(key) for key in list(halted) if draw.random() < 0.5])
            live = [one.row.key for one in together.live]
            halted |= together.halt({key for key in live if draw.random() < 0.2})
            given_up = {key for key in live if key not in halted and draw.random() < 0.03}
            together.drop(given_up)
            dropped |= given_up
            found |= {one.row.key: one.x for one in together.tick().finished}
    assert found.keys() == whole.keys() - dropped and len(found) >= 5 and same(found, whole)
    assert not together.passes


def test_a_row_that_cannot_be_planned_takes_its_lane_along_and_no_other(tiny: TextToImage) -> None:
    rows = [*rows_of(tiny, 2, sampler="heun"), replace(rows_of(tiny, 3)[2], options={"eta": "much"})]
    together = rows_over(tiny)
    with torch.no_grad():
        together.admit(rows)
        tick = together.tick()
    (failed,) = tick.failed
    assert [row.key for row in failed.rows] == [2] and isinstance(failed.error, TypeError | ValueError)
    assert same(finish(together, []), finish(rows_over(tiny), rows[:2]))


def test_guidance_outside_its_interval_costs_nothing(tiny: TextToImage) -> None:
    (row,) = (replace(row, guidance_scale=4.0) for row in rows_of(tiny, 1))
    sigmas = row.schedule.sigmas
    middle = (sigmas[4].item(), sigmas[2].item() * 1.001)  # guided at levels 2 and 3
    asked: dict[str, list[int]] = {}
    for name, interval in (("everywhere", None), ("middle", middle), ("nowhere", (0.0, 1e-9))):
        together = rows_over(tiny)
        asked[name] = counting(together)
        found = finish(together, [replace(row, guidance_interval=interval)])
        if name == "nowhere":
            off = finish(rows_over(tiny), [replace(row, guidance_scale=1.0)])
            assert torch.equal(found[0], off[0])
    assert asked["everywhere"] == [2] * 6
    assert asked["middle"] == [1, 1, 2, 2, 1, 1]
    assert asked["nowhere"] == [1] * 6


@pytest.mark.parametrize(
    ("sampler", "interval", "guided"),
    [
        ("heun", (4, 2), [1, 2, 3]),  # goes to a level that is guided
        ("heun", (1.9, 1.2), []),  # begins above and goes below
        ("dpm_2", (4, 2), [2, 3]),  # half way is above
        ("dpm_2_ancestral", (4, 2), [1, 2, 3]),  # half way to a lower level is not
        ("dpm_2", (1.9, 1.2), [1]),  # half way alone
    ],
)
def test_samplers_that_ask_twice_ask_the_null_where_either_is_guided(
    tiny: TextToImage, sampler: str, interval: tuple[float, float], guided: list[int]
) -> None:
    """Ends of the interval are levels by their place, and between two levels by a share of the logarithm."""
    (row,) = (replace(row, sampler=sampler, guidance_scale=4.0) for row in rows_of(tiny, 1))
    sigmas = row.schedule.sigmas

    def level(place: float) -> float:
        whole = int(place)
        return float(sigmas[whole] ** (1 + whole - place) * sigmas[whole + 1] ** (place - whole))

    together = rows_over(tiny)
    asked = counting(together)
    low, high = map(level, interval)
    painted = finish(together, [replace(row, guidance_interval=(low, high * 1.001))])[0]
    assert asked == [1 + (step in guided) for step in range(6) for _ in range(2)]
    plain = finish(rows_over(tiny), [replace(row, guidance_scale=1.0)])[0]
    assert torch.equal(painted, plain) == (not guided)


def test_a_gradient_outside_the_interval_is_not_taken(tiny: TextToImage) -> None:
    taken: list[int] = []

    def likeness(x0: Tensor) -> Tensor:
        taken.append(len(x0))
        return x0.flatten(1).sum(1)

    (row,) = (replace(row, guidance_scale=1.0, clip_guidance_scale=4.0, likeness=likeness) for row in rows_of(tiny, 1))
    sigmas, found = row.schedule.sigmas, {}
    middle = (sigmas[4].item(), sigmas[2].item() * 1.001)  # the gradient moves the estimate at levels 2 and 3
    for name, interval in (("everywhere", None), ("middle", middle), ("nowhere", (0.0, 1e-9))):
        found[name] = finish(rows_over(tiny), [replace(row, guidance_interval=interval)])[0]
        assert sum(taken) == {"everywhere": 6, "middle": 2, "nowhere": 0}[name]
        taken.clear()
    plain = finish(rows_over(tiny), [replace(row, clip_guidance_scale=0.0, likeness=None)])[0]
    assert torch.equal(found["nowhere"], plain) and not torch.equal(found["middle"], plain)


# --- buckets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 64])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m_sde"])
def test_rows_asked_in_chunks_are_the_same(tiny: TextToImage, sampler: str, size: int) -> None:
    rows = rows_of(tiny, 6, sampler=sampler)
    whole = finish(rows_over(tiny), rows)
    together = rows_over(tiny, buckets_of(size))
    calls = counting(together)
    assert same(finish(together, rows), whole)
    assert max(calls) == min(size, 10)
    passes = 2 if sampler == "heun" else 1
    assert len(calls[: passes * -(-10 // size)]) == passes * -(-10 // size) and sum(calls[: -(-10 // size)]) == 10


class Exhausted:
    """A network for more than `room` evaluations of which there is no memory."""

    def __init__(self, rows: Rows, room: int, error: Exception) -> None:
        self.network, self.room, self.error, self.refused = rows.network, room, error, 0

    def __call__(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if len(x) > self.room:
            self.refused += 1
            raise self.error
        return self.network(x, timestep, conditions)


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", SHORT)
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde"])
def test_when_memory_runs_out_the_same_step_goes_on_in_halves(
    tiny: TextToImage, caplog: pytest.LogCaptureFixture, sampler: str, error: Exception
) -> None:
    rows = rows_of(tiny, 6, sampler=sampler)
    whole = finish(rows_over(tiny), rows)
    together = rows_over(tiny)
    together.network = short = Exhausted(together, 3, error)
    assert same(finish(together, rows), whole)
    assert short.refused == len(caplog.records) == 2  # 10 and 5, never again
    assert "decoder (4, 8, 8): memory ran out at 10 evaluations, 5 at once from here on" in caplog.text


class ShortOf(TorchFunctionMode):
    """No memory for more than `room` latents of what an operation makes, while it is on."""

    def __init__(self, operation: object, room: int) -> None:
        super().__init__()
        self.operation, self.room, self.refused = operation, room, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is self.operation and made.shape[1:] == (4, 8, 8) and len(made) > self.room:
            self.refused += 1
            raise SHORT[0]
        return made


def test_rows_that_were_put_apart_are_together_again_after_a_while(
    tiny: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are those that come into their lane meanwhile."""
    monkeypatch.setattr("gen.rows.PATIENCE", 2)
    rows = [
        replace(row, key=f"{name} {row.key}", sampler=name) for name in ("ddim", "dpmpp_2m") for row in rows_of(tiny, 2)
    ]
    together, sizes = rows_over(tiny, buckets_of(32)), list[int]()
    network = together.network

    def counted(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        sizes.append(len(x))
        return network(x, timestep, conditions)

    together.network = counted
    calls = []
    with torch.no_grad():
        together.admit(rows)
        with ShortOf(torch.cat, 3):
            together.tick()
        late = [replace(row, key=f"late {row.key}") for row in rows[2:]]
        together.admit(late)
        for _ in range(2):
            sizes.clear()
            together.tick()
            calls.append(len(sizes))
    assert calls == [2, 1]


@pytest.mark.parametrize("operation", [torch.cat, Tensor.index_select, Tensor.view])
def test_where_memory_runs_out_beside_a_call_fewer_rows_are_together(tiny: TextToImage, operation: object) -> None:
    """As they came, in halves, down to one, and nothing is tried in vain at every step."""
    rows = [*rows_of(tiny, 5), *(replace(row, key=5 + row.key) for row in rows_of(tiny, 2, sampler="heun"))]
    whole = finish(rows_over(tiny), rows)
    together = rows_over(tiny, buckets_of(16))
    with torch.no_grad():
        together.admit(rows)
        with ShortOf(operation, 3) as short:
            tick = together.tick()
        assert short.refused and not tick.failed
        first = short.refused
        with short:
            tick = together.tick()
        assert short.refused == first and not tick.failed and len(together.live) == 7
    assert same(finish(together, []), whole)


def test_a_lane_that_never_has_memory_ends_and_the_others_go_on(
    tiny: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*rows_of(tiny, 3), *(replace(row, key=3 + row.key) for row in rows_of(tiny, 4, sampler="heun"))]
    whole = finish(rows_over(tiny), rows[:3])
    tried: list[int] = []

    def short(sampler: str, denoise: Any, state: State, *args: Any) -> State:
        if sampler == "heun":
            tried.append(len(state.x))
            raise SHORT[0]
        return advance(sampler, denoise, state, *args)

    monkeypatch.setattr("gen.attempt.advance", short)
    together = rows_over(tiny)
    with torch.no_grad():
        together.admit(rows)
        tick = together.tick()
    assert sorted(row.key for failed in tick.failed for row in failed.rows) == [3, 4, 5, 6]
    assert all("not even one fits in memory" in str(failed.error) for failed in tick.failed)
    assert tried == [4, 2, 1, 1, 2, 1, 1]
    (bucket,) = together.buckets.known.values()
    assert bucket.ceiling == UNBOUNDED  # no call was too large
    assert same(finish(together, []), whole)


def test_rows_that_there_is_no_memory_to_keep_are_lost_with_the_next_step(
    tiny: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tiny, 5)
    rows[4] = replace(rows[4], sampler="heun")
    whole = finish(rows_over(tiny), rows[4:])
    together = rows_over(tiny)

    def short(state: State, rows: Tensor) -> State:
        raise SHORT[0]

    with torch.no_grad():
        together.admit(rows)
        together.tick()
        with monkeypatch.context() as patched:
            patched.setattr(State, "select", short)
            together.drop({1})
        tick = together.tick()
    assert [[row.key for row in failed.rows] for failed in tick.failed] == [[0, 2, 3]]
    assert same(finish(together, []), whole)


def test_one_evaluation_that_does_not_fit_fails_the_rows_it_was_of(tiny: TextToImage) -> None:
    together = rows_over(tiny)
    together.network = Exhausted(together, 0, SHORT[0])
    with torch.no_grad():
        together.admit(rows_of(tiny, 2))
        tick = together.tick()
    assert not together.lanes and not tick.taken
    assert sorted(row.key for failed in tick.failed for row in failed.rows) == [0, 1]
    for failed in tick.failed:
        assert isinstance(failed.error, MemoryError) and "decoder (4, 8, 8): not even one fits" in str(failed.error)


def test_a_call_that_fails_takes_its_own_rows_along_and_no_others(tiny: TextToImage) -> None:
    rows = rows_of(tiny, 6)
    rows[4] = replace(rows[4], prompt=rows[4].prompt.copy())  # so that its evaluations are known
    whole = finish(rows_over(tiny), rows)
    together = rows_over(tiny, buckets_of(2))
    network, poison = together.network, rows[4].prompt

    def fails(x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if poison in conditions.each and together.live[0].index == 2:
            raise ValueError("a bad chunk")
        return network(x, timestep, conditions)

    together.network = fails
    found, failed = {}, []
    with torch.no_grad():
        together.admit(rows)
        while together.lanes:
            tick = together.tick()
            failed += tick.failed
            found |= {one.row.key: one.x for one in tick.finished}
    lost = {row.key for each in failed for row in each.rows}
    assert 4 in lost and [str(each.error) for each in failed] == ["a bad chunk"]
    assert set(found) == set(whole) - lost and len(found) >= 4 and same(found, whole)


def test_every_call_is_timed(tiny: TextToImage) -> None:
    together = rows_over(tiny)
    finish(together, rows_of(tiny, 3))
    (bucket,) = together.buckets.known.values()
    # five evaluations for six steps, then two and three rows' leavings; none of them is the measured one
    assert bucket.paces[3].calls == 6 and sum(pace.calls for pace in bucket.paces.values()) == 8
    assert all(0 < pace.seconds < 60 for pace in bucket.paces.values())
