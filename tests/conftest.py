"""What every test runs under: one thread (two workers share the cores), no network, quiet libraries."""

import os

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

import torch

torch.set_num_threads(1)
