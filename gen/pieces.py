"""Rows of a network's call in pieces of few fixed sizes, as they are asked of what is compiled for one size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

# Rows that a compiled network is asked at a time on a CPU, most first. Each holds what was compiled for it, so they are
# few. Where rows are large, more of them at a time are no faster and take more memory.
SIZES = (16, 8, 4, 2, 1)
LARGE_SIZES = (4, 1)
SMALL = 1024  # values of a row's first input, such as a latent of four channels and 16 x 16 cells
ASKING = 1.0  # what a call takes beside its rows, in rows: weights are read, and operations begun
OWN = 1.03  # how much longer a row takes whose text is its own


@dataclass(frozen=True)
class Piece:
    """Rows that are asked together."""

    size: int  # one of those that may be asked
    at: slice
    is_shared: bool  # whether all of them read one text


def pieces_of(rows: int, of: Sequence[int] | None, sizes: Sequence[int], streams: int = 1) -> list[Piece]:
    """Cut so many rows into pieces of these sizes (descending, the last of them 1) for so many streams.

    `of` is which text each row reads (None: no row can share its text). Pieces of one text each or of any texts are
    cut, whichever takes less time.
    """
    fitting = [size for size in sizes if size == 1 or size * streams <= rows]
    ways = [[Piece(*each, False) for each in cut(0, rows, fitting, streams)]]
    if of is not None:
        ends = accumulate(len(list(run)) for _, run in groupby(of))
        shared = [Piece(*each, True) for start, end in pairwise([0, *ends]) for each in cut(start, end, fitting)]
        ways.append(shared)
    return min(ways, key=lambda pieces: time_of(pieces, streams))


def time_of(pieces: Sequence[Piece], streams: int) -> float:
    """What pieces take, in rows that share a text, where all of one kind are computed and then all of another."""
    counts = Counter((piece.size, piece.is_shared) for piece in pieces)
    rounds = {kind: math.ceil(count / streams) for kind, count in counts.items()}
    return sum(rounds[size, shared] * (size * (1.0 if shared else OWN) + ASKING) for size, shared in counts)


def cut(start: int, end: int, sizes: Sequence[int], streams: int = 1) -> Iterator[tuple[int, slice]]:
    """Rows in pieces of these sizes, largest first, as many of each for every stream but for the last single rows."""
    for size in sizes:
        together = 1 if size == 1 else streams
        for _ in range((end - start) // (size * together) * together):
            yield size, slice(start, start + size)
            start += size
