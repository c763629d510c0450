"""The progress bar."""

from __future__ import annotations

import pytest

from gen import TextToImage


def test_progress_goes_to_standard_error_and_only_when_asked(
    tiny: TextToImage, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny("a star", seed=1)
    assert capfd.readouterr() == ("", "")
    tiny("a star", seed=1, progress=True)
    printed = capfd.readouterr()
    assert printed.out == "" and "decoder" in printed.err and "prior" in printed.err
