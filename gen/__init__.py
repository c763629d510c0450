"""Painting: rows, conditions, families of checkpoints, the search over candidates, and the Python face.

`from gen import TextToImage` is the way in. Names are imported when first asked for (PEP 562), so that the
command line can say `--help` without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen.answer import Interrupted, Result
    from gen.batch import Batch
    from gen.engine import Engine
    from gen.flight import Cancelled, Step
    from gen.pipeline import TextToImage
    from gen.request import Request
    from gen.settings import Settings

_HOMES = {
    "Batch": "gen.batch",
    "Cancelled": "gen.flight",
    "Engine": "gen.engine",
    "Interrupted": "gen.answer",
    "Request": "gen.request",
    "Result": "gen.answer",
    "Settings": "gen.settings",
    "Step": "gen.flight",
    "TextToImage": "gen.pipeline",
}

__all__ = ["Batch", "Cancelled", "Engine", "Interrupted", "Request", "Result", "Settings", "Step", "TextToImage"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
