"""Noise as a function of (seed, stage, step), never of who else is in the batch.

Block `step` of the float32 stream of one CPU `torch.Generator` per row, so one image with one generator in
diffusers draws the same numbers, on every device. Stages other than the decoder seed their stream elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SEEDS = 2**32  # the CPU generator reads the low 32 bits of its seed and no more

# Added to the seed, modulo 2**32. The decoder's stream is diffusers' own; the others are primes of xxHash.
STAGES = {
    "decoder": 0,
    "prior": 0x9E3779B1,
    "negative_prior": 0x165667B1,
    "image_noise": 0x85EBCA77,
    "super_resolution": 0xC2B2AE3D,
}


class NoiseStream:
    """The noise of some rows, drawn one block a step and never again from the beginning."""

    def __init__(self, seeds: Sequence[int], stage: str, shape: Sequence[int]) -> None:
        """`shape` is one row's; raises ValueError for a seed outside 0 .. 2**32 - 1 or an unknown stage."""
        if stage not in STAGES:
            raise ValueError(f"noise stage {stage!r} is unknown; choose from: {', '.join(STAGES)}")
        for seed in seeds:
            if not 0 <= seed < SEEDS:
                raise ValueError(f"seed {seed} is out of range; give an integer from 0 to {SEEDS - 1}")
        self.shape = tuple(shape)
        self._starts = [(seed + STAGES[stage]) % SEEDS for seed in seeds]
        self._rngs = [torch.Generator("cpu").manual_seed(start) for start in self._starts]
        self._steps = [0] * len(self._starts)  # the block each generator gives next

    def at(self, step: int | Sequence[int]) -> Tensor:
        """Block `step` of every row, or each row's own: (B, *shape) float32 on the CPU; 0 is the start."""
        steps = [step] * len(self._rngs) if isinstance(step, int) else list(step)
        assert len(steps) == len(self._rngs), "one step per row"
        blocks = [self._block(row, step) for row, step in enumerate(steps)]
        return torch.stack(blocks) if blocks else torch.empty(0, *self.shape)

    def _block(self, row: int, step: int) -> Tensor:
        if step < self._steps[row]:  # back in time: the stream has to be drawn again
            self._rngs[row].manual_seed(self._starts[row])
            self._steps[row] = 0
        # One randn a block, as diffusers draws: under 16 numbers the generator is read in another way.
        for _ in range(self._steps[row], step):
            torch.randn(self.shape, generator=self._rngs[row])
        self._steps[row] = step + 1
        return torch.randn(self.shape, generator=self._rngs[row])


def noise(seeds: Sequence[int], stage: str, step: int | Sequence[int], shape: Sequence[int]) -> Tensor:
    """Block `step` (one for all, or one per row) of every seed's stream: (B, *shape) float32 on the CPU."""
    return NoiseStream(seeds, stage, shape).at(step)
