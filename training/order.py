"""Which examples each batch holds: a pure function of the seed and the batch's number.

Because nothing is remembered, training resumes in the middle of an epoch at the very batch it would have seen, and
any number of processes share one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Order:
    """Batches of `batch_size` indices; groups are shuffled every epoch and stay together.

    A batch may cut the last group it holds. The rest of an epoch that fills no batch is left out.

    Raises ValueError when there are fewer examples than one batch needs.
    """

    groups: Sequence[Sequence[int]]
    batch_size: int
    seed: int
    _epoch: tuple[int, list[int]] | None = field(default=None, repr=False)  # the latest epoch's indices, in order

    def __post_init__(self) -> None:
        self.num_examples = sum(len(group) for group in self.groups)
        self.batches_per_epoch = self.num_examples // self.batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the {self.num_examples} usable examples;"
                " lower train.batch_size or add data"
            )

    def batch(self, number: int) -> list[int]:
        """The indices of batch `number`, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.groups), generator=rng).tolist()
            self._epoch = (epoch, [index for group in order for index in self.groups[group]])
        return self._epoch[1][place * self.batch_size : (place + 1) * self.batch_size]

    def batches(self, start: int, stop: int, step: int) -> Iterator[list[int]]:
        """Batches start, start + step, ... below stop: one process's share."""
        for number in range(start, stop, step):
            yield self.batch(number)
