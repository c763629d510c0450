"""What every task has of its own: which examples are held back, and the error over them."""

import pytest
import torch

from tests.training.line import NUM_POINTS, Line
from training import task as module
from training.task import moved


def test_the_last_examples_are_kept_for_validation() -> None:
    task = Line()
    assert not task.validation_indices and len(task.groups()) == NUM_POINTS
    task.num_validation = 6
    assert list(task.validation_indices) == list(range(NUM_POINTS - 6, NUM_POINTS))
    assert len(task.groups()) == NUM_POINTS - 6
    index, *_ = task.batch_of(task.validation_indices[:2])
    assert index.tolist() == [NUM_POINTS - 6, NUM_POINTS - 5]


def test_the_error_is_of_all_that_is_kept_for_validation_with_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 4)
    task, other = Line(noise=0.5), Line(noise=0.5)
    task.num_validation = 10
    with torch.no_grad():
        for weight in other.network.parameters():
            weight.mul_(2)
    trained = task.network
    error = task.validation_loss(other.network, "loss")
    assert [len(batch) for batch in task.seen] == [4, 4, 2]
    assert [index for batch in task.seen for index in batch] == list(task.validation_indices)
    assert task.network is trained and task.validation_loss(other.network, "loss") == error
    batches = [task.batch_of(range(first, min(first + 4, 64))) for first in (54, 58, 62)]
    with torch.no_grad():
        each = [
            other(batch, torch.Generator().manual_seed(first))["loss"]
            for batch, first in zip(batches, (54, 58, 62), strict=True)
        ]
    assert error == torch.stack(each).mean().item() != task.validation_loss(trained, "loss")


def test_a_batch_of_any_kind_is_moved() -> None:
    batch = moved({"x": torch.ones(2), "rest": [("a", torch.zeros(1)), 3]}, torch.device("meta"))
    assert batch["x"].is_meta and batch["rest"][0][1].is_meta
    assert (batch["rest"][0][0], batch["rest"][1]) == ("a", 3)
