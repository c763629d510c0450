"""Rows of a network's call in pieces of few fixed sizes, as they are asked of what is compiled for one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

# Rows that a compiled network is asked at a time on a CPU, most first. Each holds what was compiled for it, so they are
# few. Where rows are large, more of them at a time are no faster and take more memory.
SIZES = (16, 8, 4, 1)
LARGE_SIZES = (4, 1)
SMALL = 1024  # values of a row's first input, such as a latent of four channels and 16 x 16 cells


@dataclass(frozen=True)
class Piece:
    """Rows that are asked together."""

    size: int  # one of those that may be asked
    at: slice
    is_shared: bool  # whether all of them read one text


def pieces_of(rows: int, of: Sequence[int] | None, sizes: Sequence[int], streams: int = 1) -> Iterator[Piece]:
    """So many rows in pieces of these sizes, of which the last is 1, small enough for each stream to have its share.

    `of` is which text each row reads (None: no row can share its text). Pieces of one text each are cut unless rows
    of one text are so few that it takes more than twice as many pieces.
    """
    fitting = [size for size in sizes if size == 1 or size * streams <= rows]
    whole = [Piece(size, at, False) for size, at in cut(0, rows, fitting)]
    if of is not None:
        ends = accumulate(len(list(run)) for _, run in groupby(of))
        shared = [Piece(*each, True) for start, end in pairwise([0, *ends]) for each in cut(start, end, fitting)]
        if len(shared) <= 2 * len(whole):
            return iter(shared)
    return iter(whole)


def cut(start: int, end: int, sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Rows in pieces of these sizes, largest first."""
    for size in sizes:
        while end - start >= size:
            yield size, slice(start, start + size)
            start += size
