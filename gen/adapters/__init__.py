"""What is added to a loaded model. Each kind has a module, and a file of its own on disk."""

from gen.adapters import lora, textual_inversion
from gen.adapters.file import Adapter

__all__ = ["Adapter", "lora", "textual_inversion"]
