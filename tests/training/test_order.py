"""The order of examples: everyone once an epoch, groups together, and the same wherever one begins."""

import itertools

import pytest

from training.order import Order

GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10], [11, 12, 13, 14], [15]]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16])
def test_every_example_once_an_epoch(batch_size: int) -> None:
    order = Order(GROUPS, batch_size, seed=3)
    assert order.batches_per_epoch == 16 // batch_size
    for epoch in range(3):
        first = epoch * order.batches_per_epoch
        seen = [index for number in range(order.batches_per_epoch) for index in order.batch(first + number)]
        assert sorted(seen) == list(range(16))


def test_the_rest_that_fills_no_batch_is_another_every_epoch() -> None:
    order = Order([[index] for index in range(10)], 3, seed=0)
    left = []
    for epoch in range(20):
        seen = {index for number in range(3) for index in order.batch(3 * epoch + number)}
        assert len(seen) == 9
        left.append((set(range(10)) - seen).pop())
    assert len(set(left)) > 5


def test_groups_stay_together_and_in_order() -> None:
    groups = [[4 * index + place for place in range(4)] for index in range(10)]
    order = Order(groups, 8, seed=1)
    for number in range(20):
        batch = order.batch(number)
        assert batch[:4] in groups and batch[4:] in groups


def test_epochs_and_seeds_differ() -> None:
    groups = [[index] for index in range(32)]
    epochs = [tuple(Order(groups, 32, seed).batch(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(epochs)) == 16


def test_beginning_at_k_equals_never_stopping() -> None:
    never = Order(GROUPS, 3, seed=5)
    straight = list(never.batches(0, 40, 1))
    for start in (0, 1, 4, 5, 6, 23, 39):
        assert list(Order(GROUPS, 3, seed=5).batches(start, 40, 1)) == straight[start:]
    assert [never.batch(number) for number in (39, 0, 17)] == [straight[39], straight[0], straight[17]]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_order(processes: int) -> None:
    straight = list(Order(GROUPS, 2, seed=5).batches(0, 12, 1))
    shares = [list(Order(GROUPS, 2, seed=5).batches(rank, 12, processes)) for rank in range(processes)]
    merged = [batch for step in itertools.zip_longest(*shares) for batch in step if batch is not None]
    assert merged == straight


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 17 is larger than the 16 usable examples; lower train.batch"):
        Order(GROUPS, 17, seed=0)
    with pytest.raises(ValueError, match="the 0 usable examples"):
        Order([], 1, seed=0)
