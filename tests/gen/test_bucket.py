"""Buckets: how many evaluations are asked at once, from what was measured and from where memory ran out."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gen.bucket import FEW, MOST_PATIENCE, PATIENCE, PROBE, Bucket, Footprint, next_cut


def test_cuts_make_the_fewest_calls_and_part_no_group_where_they_need_not() -> None:
    def cuts(counts: list[int], size: int) -> list[int]:
        ends = torch.tensor(counts).cumsum(0).tolist()
        found = [0]
        while found[-1] < ends[-1]:
            found.append(next_cut(ends, found[-1], size))
        return [stop - start for start, stop in pairwise(found)]

    assert cuts([4, 4, 4], 8) == [8, 4]
    assert cuts([3, 3, 3, 3], 8) == [6, 6]
    assert cuts([6, 6], 8) == [6, 6]  # and not 8 and 4
    assert cuts([5, 5, 5], 8) == [8, 7]  # two calls leave no choice
    assert cuts([20], 8) == [8, 8, 4]
    assert cuts([1, 1, 1], 1) == [1, 1, 1]
    for size in range(1, 12):
        assert len(cuts([3, 1, 4, 1, 5], size)) == -(-14 // size)
        assert max(cuts([3, 1, 4, 1, 5], size)) <= size


def test_a_bucket_is_what_memory_holds_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket("decoder", torch.device("cpu"))
    assert bucket.wants_probe(3) and not bucket.wants_probe(PROBE)
    weight = torch.ones(1000, 1000)

    def call() -> Tensor:
        x = torch.ones(PROBE, 1000) @ weight  # 8 kB, and as much for the ones
        return x.view(-1)[1:].mul_(2)  # nothing new

    bucket.probe(call)
    assert bucket.cost == 8000.0 and not bucket.wants_probe(3)
    monkeypatch.setattr("gen.bucket.free_memory", lambda device: 2 * 8000 * 100)
    bucket.refresh()
    assert bucket.size == 64  # the power of two below 100
    assert bucket.halve(50) and (bucket.size, bucket.ceiling) == (25, 25)
    bucket.refresh()
    assert bucket.size == 25
    monkeypatch.setattr("gen.bucket.free_memory", lambda device: 0)
    bucket.refresh()
    assert bucket.size == 1 and not bucket.halve(1)


def test_a_ceiling_rises_again_once_memory_has_lasted_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gen.bucket.free_memory", lambda device: 2 * 8000 * 100)
    bucket = Bucket("decoder", torch.device("cpu"), cost=8000.0)
    bucket.refresh()
    assert bucket.size == 64
    assert bucket.halve(64) and bucket.halve(32) and bucket.size == 16
    sizes = []
    for _ in range(PATIENCE):
        bucket.succeed(7)  # of which more than twice as many are known to fit
    assert bucket.size == 16
    for _ in range(3 * PATIENCE):
        bucket.succeed(2 * bucket.size)
        sizes.append(bucket.size)
    assert [sizes.count(size) for size in (16, 32, 64)] == [PATIENCE - 1, PATIENCE, PATIENCE + 1]  # and no more
    unmeasured = Bucket("decoder", torch.device("mps"))
    assert unmeasured.halve(8)
    for _ in range(PATIENCE):
        assert unmeasured.size == 4
        unmeasured.succeed(4)
    assert unmeasured.size == 8


def test_a_bucket_that_had_no_room_to_be_measured_is_once_it_has() -> None:
    bucket = Bucket("decoder", torch.device("cpu"))
    assert bucket.wants_probe(8) and bucket.halve(PROBE) and not bucket.wants_probe(8)
    for _ in range(PATIENCE):
        bucket.succeed(8)
    assert bucket.wants_probe(8)


def test_where_memory_runs_out_again_it_is_waited_for_longer() -> None:
    """Ten evaluations never fit: they are asked ever more rarely, and what fits is asked in between."""
    bucket, failed, count = Bucket("decoder", torch.device("cpu")), list[int](), 0
    while count < 20_000:
        if bucket.size >= 10:
            assert bucket.halve(10) and bucket.size == 5
            failed.append(count)
        count += 1
        bucket.succeed(10)
    waits = [after - before for before, after in pairwise(failed)]
    doubling = [min(PATIENCE * 2**k, MOST_PATIENCE) for k in range(len(waits))]
    assert waits == doubling and len(waits) == 9 and waits[-1] == MOST_PATIENCE


def test_enough_is_where_twice_as_many_are_hardly_faster() -> None:
    """A call takes 8 units and 1 more for each evaluation: from 64 on, twice as many save less than a tenth of each."""
    bucket = Bucket("decoder", torch.device("cpu"), size=256)
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        assert bucket.enough == 256
        for _ in range(4):
            bucket.note(count, 8.0 + count)
    for _ in range(2):
        for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            bucket.note(count, 80.0 + 10 * count)  # a busy moment does not count
    assert bucket.enough == 64
    bucket.size = 32
    assert bucket.enough == 32
    uneven = Bucket("decoder", torch.device("cpu"))
    for count in [3, 5, 7, 15, 31, 63, 100] * 5:
        uneven.note(count, 8.0 + count)
    assert uneven.enough == 63  # not the 32 that its class begins with


def test_more_are_let_into_flight_as_long_as_that_is_faster() -> None:
    """From a few on twice as many, until twice as many are hardly faster: here from 512 on."""
    bucket = Bucket("decoder", torch.device("cpu"))
    asked = []
    while len(asked) < 40:
        asked.append(bucket.most)
        bucket.note(bucket.most, 100.0 + bucket.most)
    assert asked == [FEW] * 5 + [256] * 5 + [512] * 5 + [1024] * 5 + [512] * 20
    bucket.size = 32
    assert bucket.most == 32


@pytest.mark.parametrize("counts", [(126, 128), (120, 128), (124, 130), (200, 256)])
def test_calls_of_nearly_one_size_do_not_say_that_larger_ones_are_no_faster(counts: tuple[int, int]) -> None:
    bucket = Bucket("decoder", torch.device("cpu"))
    for count in counts * 5:
        bucket.note(count, 100.0 + count)
    assert bucket.most == 2 * max(counts)


def test_where_no_call_is_timed_all_that_fit_are_worth_having() -> None:
    bucket = Bucket("decoder", torch.device("xpu"))
    assert bucket.most == bucket.size > FEW


def test_a_footprint_is_no_less_than_what_is_in_use_at_once() -> None:
    with Footprint() as footprint:
        kept = [torch.zeros(1000) for _ in range(5)]
        for _ in range(50):
            torch.zeros(1000)
    assert 4 * 1000 * 6 <= footprint.bytes < 4 * 1000 * 56 and len(kept) == 5


def test_engines_of_several_threads_share_a_bucket() -> None:
    bucket = Bucket("decoder", torch.device("cpu"))
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet where they could hurt each other
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda k: bucket.ask(1 << k % 40, lambda: (k, bucket.most)[0]), range(20_000)))
    finally:
        sys.setswitchinterval(often)
    assert answers == list(range(20_000))
    assert [pace.calls for _, pace in sorted(bucket.paces.items())] == [500] * 40
