"""What every test runs under: one thread (two workers share the cores), no network, quiet libraries; a tiny model."""

import os
from pathlib import Path

# Before any library reads them: subprocesses that the tests start inherit these too.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    ACCELERATE_USE_CPU="true",  # training is promised to the bit on the CPU alone
    CUBLAS_WORKSPACE_CONFIG=":4096:8",  # cuBLAS adds in a fixed order only with this
    NO_COLOR="1",
    COLUMNS="110",
)

import pytest
import torch

from tests.tiny import make_tiny_stable_unclip

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_stable_unclip(tmp_path_factory.mktemp("models") / "tiny")
