"""A tiny random CLIP of the real classes."""

import pytest
import torch

from clip_core.clip import CLIP
from tests.tiny import tiny_clip, tiny_tokenizer


@pytest.fixture(scope="session")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(tiny_clip(tokenizer := tiny_tokenizer()), tokenizer)
