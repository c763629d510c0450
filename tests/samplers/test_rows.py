"""What a row becomes does not depend on the rows beside it, at whatever levels all of them are."""

import pytest
import torch
from torch import Tensor

from samplers.noise import noise
from samplers.sample import SAMPLERS, advance, start, start_from
from samplers.schedule import Schedule, karras
from samplers.state import Denoise, Prediction, State
from tests.samplers.exact import levels, mixture, pictures

SHAPE, SEEDS = (2, 3, 3), [11, 12, 13, 14, 15]
SCHEDULE = karras(5, 0.05, 10.0)
TWICE = Schedule(torch.tensor([10.0, 4.0, 4.0, 1.5, 0.4, 0.0], dtype=torch.float64), start_scale=10.0)  # as PLMS begins
DATA = mixture(pictures(4, SHAPE), width=0.3)


def denoise(x: Tensor, sigma: Tensor) -> Prediction:
    """One row at a time, so that the arithmetic of a row is the same whatever its batch is."""
    x0 = torch.cat([DATA(x[i : i + 1], sigma[i : i + 1]).x0 for i in range(len(x))])
    return Prediction(x0, variance=x0.tanh().abs())


def options_of(sampler: str, seeds: list[int]) -> dict[str, Tensor]:
    """Rows that differ in their options too, where the sampler has any."""
    kinds = {
        "bh1": [seed % 2 for seed in seeds],
        "clip": [[0.5, 2.0, float("inf")][seed % 3] for seed in seeds],
        "eta": [seed % 3 / 2 for seed in seeds],
        "s_churn": [seed % 2 * 1.5 for seed in seeds],
        "s_tmax": [seed % 3 * 4.0 for seed in seeds],
        "solver_order": [1 + seed % 3 for seed in seeds],
        "lower_order_final": [seed % 2 for seed in seeds],
    }
    taken = SAMPLERS[sampler].defaults
    return {name: torch.tensor(values).float() for name, values in kinds.items() if name in taken}


def schedule_of(sampler: str) -> Schedule:
    return TWICE if sampler == "pndm" else SCHEDULE


def move(sampler: str, state: State, seeds: list[int], at: list[int], network: Denoise = denoise) -> State:
    drawn = noise(seeds, "decoder", [index + 1 for index in at], SHAPE)
    now, next = (levels(schedule_of(sampler), [index + ahead for index in at]) for ahead in (0, 1))
    return advance(sampler, network, state, now, next, drawn, options_of(sampler, seeds))


def alone(sampler: str, seed: int, steps: int) -> State:
    """One row in a batch of its own, so many steps from the start."""
    state = start(sampler, noise([seed], "decoder", 0, SHAPE), torch.full((1,), SCHEDULE.start_scale))
    for index in range(steps):
        state = move(sampler, state, [seed], [index])
    return state


def assert_equal(one: State, other: State) -> None:
    torch.testing.assert_close(one.x, other.x, atol=0, rtol=0)
    assert one.memory.keys() == other.memory.keys()
    for name in one.memory:
        torch.testing.assert_close(one.memory[name], other.memory[name], atol=0, rtol=0)


def mixed(sampler: str, at: list[int]) -> State:
    """Row i is SEEDS[i], at[i] steps on."""
    state = alone(sampler, SEEDS[0], at[0])
    for seed, index in zip(SEEDS[1:], at[1:], strict=True):
        state = state.cat(alone(sampler, seed, index))
    return state


AT = [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [4, 4, 0, 1, 0]]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("at", AT)
def test_cat_commutes_with_advance(sampler: str, at: list[int]) -> None:
    together = move(sampler, mixed(sampler, at), SEEDS, at)
    assert_equal(together, mixed(sampler, [index + 1 for index in at]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("rows", [[3], [4, 0], [2, 2, 1], []])
def test_select_commutes_with_advance(sampler: str, at: list[int], rows: list[int]) -> None:
    state, kept = mixed(sampler, at), torch.tensor(rows, dtype=torch.int64)
    if not rows:
        assert len(state.select(kept).x) == 0
        return
    after = move(sampler, state, SEEDS, at).select(kept)
    before = move(sampler, state.select(kept), [SEEDS[row] for row in rows], [at[row] for row in rows])
    assert_equal(after, before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mask_selects_like_its_indices(sampler: str) -> None:
    state = mixed(sampler, [0, 1, 2, 3, 4])
    mask = torch.tensor([True, False, False, True, True])
    assert_equal(state.select(mask), state.select(mask.nonzero()[:, 0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_picture_depends_on_no_slot_and_no_batch_size(sampler: str, size: int) -> None:
    expected = alone(sampler, SEEDS[0], 5).x[0]
    for slot in range(size):
        seeds = [1000 + k for k in range(size)]
        seeds[slot] = SEEDS[0]
        state = start(sampler, noise(seeds, "decoder", 0, SHAPE), torch.full((size,), SCHEDULE.start_scale))
        for index in range(5):
            state = move(sampler, state, seeds, [index] * size)
        torch.testing.assert_close(state.x[slot], expected, atol=0, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_join_and_leave_on_the_way(sampler: str) -> None:
    """A server's batch: a row is admitted while others are under way, one is dropped, one is finished."""
    state, seeds, at = mixed(sampler, [0, 1, 2, 3, 4]), list(SEEDS), [0, 1, 2, 3, 4]
    finished: dict[int, Tensor] = {}
    while seeds:
        state = move(sampler, state, seeds, at)
        at = [index + 1 for index in at]
        finished |= {seeds[row]: state.x[row] for row, index in enumerate(at) if index == 5}
        go_on = [row for row, index in enumerate(at) if index < 5 and not (seeds[row] == 13 and index == 3)]
        state = state.select(torch.tensor(go_on, dtype=torch.int64))
        seeds, at = [seeds[row] for row in go_on], [at[row] for row in go_on]
        if 99 not in finished and 99 not in seeds:
            state, seeds, at = state.cat(alone(sampler, 99, 0)), [*seeds, 99], [*at, 0]
    assert finished.keys() == {11, 12, 14, 15, 99}
    for seed, x in finished.items():
        torch.testing.assert_close(x, alone(sampler, seed, 5).x[0], atol=0, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_ruined_neighbour_ruins_nobody(sampler: str) -> None:
    """A row of NaN, as a broken network would give, stays alone."""

    def broken(x: Tensor, sigma: Tensor) -> Prediction:
        whole = denoise(x, sigma)
        return Prediction(torch.cat([whole.x0[:1] * float("nan"), whole.x0[1:]]), whole.variance)

    at = [0, 1, 2, 3, 4]
    moved = move(sampler, mixed(sampler, at), SEEDS, at, broken)
    assert moved.x[0].isnan().all()
    assert_equal(
        moved.select(torch.arange(1, 5)),
        move(sampler, mixed(sampler, at), SEEDS, at).select(torch.arange(1, 5)),
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_from_the_middle_share_a_step(sampler: str) -> None:
    """img2img rows beside text-to-image rows at the same index: the first have no past, the others have."""
    level = levels(schedule_of(sampler), [3])
    entered = start_from(sampler, pictures(1, SHAPE), noise([7], "decoder", 0, SHAPE), level.sigma)
    both = move(sampler, entered.cat(alone(sampler, 12, 3)), [7, 12], [3, 3])
    assert_equal(both, move(sampler, entered, [7], [3]).cat(alone(sampler, 12, 4)))
