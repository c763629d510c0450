"""The moving average of a network in training, which is what is saved and looked at."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """An exponential moving average whose decay warms up as (1 + n) / (10 + n), so early weights fade."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follow the network by one step; not as AveragedModel does, which waits for the device at every step."""
        count = int(self.n_averaged)  # on the CPU
        kept = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - kept)
        for held, current in zip(self.module.buffers(), model.buffers(), strict=True):
            held.copy_(current)
        self.n_averaged += 1
