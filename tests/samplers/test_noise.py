"""Noise is a function of (seed, stage, step), and the decoder's is what diffusers draws."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from samplers.noise import SEEDS, STAGES, NoiseStream, noise

SHAPES = [(2,), (3, 5), (4, 8, 8)]  # fewer and more than 16 numbers: the generator reads them differently


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_the_draws_of_diffusers(shape: tuple[int, ...]) -> None:
    seeds = [0, 1, 2**31, SEEDS - 1]
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    for step in range(4):
        drawn = randn_tensor((len(seeds), *shape), generator=rngs, dtype=torch.float32)
        assert torch.equal(noise(seeds, "decoder", step, shape), drawn)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", STAGES)
def test_streams_give_the_blocks_in_any_order(stage: str, shape: tuple[int, ...]) -> None:
    stream = NoiseStream([3, 4], stage, shape)
    for step in (0, 1, 2, 5, 5, 1, 6):
        assert torch.equal(stream.at(step), noise([3, 4], stage, step, shape))


def test_rows_may_be_at_different_steps() -> None:
    drawn = noise([3, 4, 3], "prior", [2, 0, 1], (4,))
    for row, (seed, step) in enumerate([(3, 2), (4, 0), (3, 1)]):
        assert torch.equal(drawn[row], noise([seed], "prior", step, (4,))[0])


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    stream = NoiseStream([3, 4, 5], "decoder", (4, 4))
    stream.at(0)
    assert torch.equal(stream.at(1)[[2, 0]], noise([5, 3], "decoder", 1, (4, 4)))
    assert noise([], "decoder", 2, (4, 4)).shape == (0, 4, 4)


def test_stages_share_no_numbers() -> None:
    """Not even bit patterns of 32 bits of the seed: what was drawn for one stage occurs in no other."""
    numbers = {stage: noise([7], stage, [0], (4096,)).flatten() for stage in STAGES}
    for stage, drawn in numbers.items():
        for other, theirs in numbers.items():
            if stage != other:
                assert torch.isin(drawn, theirs).float().mean() < 0.01
    starts = {offset % SEEDS for offset in STAGES.values()}
    assert len(starts) == len(STAGES) and STAGES["decoder"] == 0


def test_the_generator_reads_32_bits_of_its_seed() -> None:
    """Why offsets are added modulo 2**32, and why larger seeds are refused: they would repeat pictures."""
    one, other = (torch.randn(32, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + SEEDS))
    assert torch.equal(one, other)


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed} is out of range; give an integer from 0 to 4294967295"):
        noise([seed], "decoder", 0, (4,))


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="noise stage 'priors' is unknown; choose from: decoder, prior"):
        noise([0], "priors", 0, (4,))
