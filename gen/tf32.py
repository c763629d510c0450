"""Float32 that means float32: no TF32 in cuDNN's convolutions while a model computes.

On CUDA torch lets cuDNN round to 10 bits what convolutions of float32 multiply, unless the process is told otherwise,
and this is a lower precision that nobody asked for. Matrix products are not rounded unless somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch


@dataclass(eq=False)
class Switch:
    """Torch's switch for the process: off while any of its threads computes, and then as it was."""

    inside: int = 0  # how many compute now
    before: bool = False  # whether it was on before the first of these
    _lock: Lock = field(default_factory=Lock)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Off at least until this ends."""
        with self._lock:
            if self.inside == 0:
                self.before = torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.allow_tf32 = False
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
                if self.inside == 0:
                    torch.backends.cudnn.allow_tf32 = self.before


without_tf32 = Switch().off
