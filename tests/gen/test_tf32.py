"""gen/tf32.py: a switch of the process is off while any of its threads computes, and then as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gen.tf32 import without_tf32


@pytest.fixture(autouse=True, params=[True, False])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = was


def test_the_last_to_leave_restores_it(before: bool) -> None:
    first, second = without_tf32(), without_tf32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as two threads may meet, not one within the other
    assert torch.backends.cudnn.allow_tf32 is False
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 is before


def test_an_error_restores_it(before: bool) -> None:
    with pytest.raises(RuntimeError, match="out of luck"), without_tf32():
        raise RuntimeError("out of luck")
    assert torch.backends.cudnn.allow_tf32 is before
