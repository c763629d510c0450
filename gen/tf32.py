"""Float32 that means float32: no TF32 in cuDNN's convolutions while a model computes.

On CUDA torch lets cuDNN round to 10 bits what convolutions of float32 multiply, unless the process is told otherwise,
and this is a lower precision that nobody asked for. Matrix products are not rounded unless somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch.backends import cudnn


def without_tf32(device: torch.device) -> AbstractContextManager[None]:
    """While it lasts, what computes on the device computes without; elsewhere than on CUDA nothing else does."""
    return SWITCH.off() if device.type == "cuda" else nullcontext()


@dataclass(eq=False)
class Switch:
    """Torch's switch for the process: off while any of its threads computes, and then as it was."""

    inside: int = 0  # how many compute now
    restore: Callable[[], None] = lambda: None  # as the first of these found it
    _lock: Lock = field(default_factory=Lock)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Off at least until this ends."""
        with self._lock:
            if self.inside == 0:
                self.restore = turned_off()
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
                if self.inside == 0:
                    self.restore()


SWITCH = Switch()
CONVOLUTIONS: Any = cudnn.conv  # type: ignore[attr-defined]  # torch's newer interface


def turned_off() -> Callable[[], None]:
    """Turn it off; what is returned puts it back.

    Torch has two interfaces to it, of which the older one raises where the newer one has told convolutions and other
    layers apart, and does nothing where the newer one has spoken for all of them.
    """
    try:
        before = cudnn.allow_tf32
    except RuntimeError:
        pass
    else:
        cudnn.allow_tf32 = False
        if CONVOLUTIONS.fp32_precision != "tf32":
            return lambda: setattr(cudnn, "allow_tf32", before)
        cudnn.allow_tf32 = before
    precision = CONVOLUTIONS.fp32_precision
    CONVOLUTIONS.fp32_precision = "ieee"
    return lambda: setattr(CONVOLUTIONS, "fp32_precision", precision)
