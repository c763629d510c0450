"""What requests of every kind are answered with when each is painted by itself."""

from __future__ import annotations

import pytest

from gen import TextToImage
from tests.gen.engine.asked import KINDS, Latents, alone


@pytest.fixture(scope="session")
def expected(tiny: TextToImage) -> list[Latents]:
    """Of each of `KINDS`, in their order."""
    return [alone(tiny, request) for request in KINDS]
