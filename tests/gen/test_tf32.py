"""gen/tf32.py: a switch of the process is off while any of its threads computes, and then as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.backends import cudnn

from gen.tf32 import without_tf32

CUDA = torch.device("cuda")


def both_ways() -> None:
    cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = "tf32"


SWITCHES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "off": lambda: setattr(cudnn, "allow_tf32", False),
    "convolutions off": lambda: setattr(cudnn.conv, "fp32_precision", "ieee"),
    "all of them on": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "off, and convolutions on": both_ways,
}


def state() -> tuple[object, ...]:
    try:
        old: object = cudnn.allow_tf32
    except RuntimeError as error:
        old = type(error)
    return old, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


@pytest.fixture(params=SWITCHES.values(), ids=SWITCHES)
def before(request: pytest.FixtureRequest) -> Iterator[tuple[object, ...]]:
    """The switch as a user of torch may have left it, by either interface."""
    everywhere = torch.backends.fp32_precision
    request.param()
    yield state()
    torch.backends.fp32_precision = everywhere
    cudnn.allow_tf32 = True
    assert cudnn.conv.fp32_precision == "tf32", "torch's own default"


def test_the_last_to_leave_restores_it(before: tuple[object, ...]) -> None:
    first, second = without_tf32(CUDA), without_tf32(CUDA)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as two threads may meet, not one within the other
    assert cudnn.conv.fp32_precision != "tf32"
    second.__exit__(None, None, None)
    assert state() == before


def test_an_error_restores_it(before: tuple[object, ...]) -> None:
    with pytest.raises(RuntimeError, match="out of luck"), without_tf32(CUDA):
        assert cudnn.conv.fp32_precision != "tf32"
        raise RuntimeError("out of luck")
    assert state() == before


def test_on_a_cpu_nothing_is_switched(before: tuple[object, ...]) -> None:
    with without_tf32(torch.device("cpu")):
        assert state() == before
