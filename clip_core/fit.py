"""Whether weights are those that a configuration asks for: in names, in shapes and in how many they are.

Owns what is refused of a configuration's sizes, before any memory is taken for them, and what is said of weights that
do not fit: one line that names them. It reads no file and knows no kind of network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

NAMED = 5  # weights that an error names
LARGEST = 1_000_000  # of any whole number in a configuration; vocabularies reach some 250,000
MOST_LAYERS = 1_000  # of what is built one after the other
MOST_PIXELS = 16_384  # of a picture's side, or of its latents'
SIDES = {"sample_size", "image_size", "size", "crop_size", "height", "width", "shortest_edge", "longest_edge"}
SPARE = 100_000_000  # numbers that a network may have beyond those of its files, to be missed name by name


def named(keys: Sequence[str]) -> str:
    """Weights by name, the first five of them and how many more there are, with the verb."""
    if len(keys) == 1:
        return f"weight {keys[0]} is"
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"weights {', '.join(keys[:NAMED])}{more} are"


def check_fit(what: str, missing: Iterable[str], misshaped: Iterable[str], extra: Iterable[str]) -> None:
    """ValueError that names weights that a network lacks or has in another shape; what is too much is in the log."""
    if lacks := sorted(missing):
        raise ValueError(f"{what} is damaged: {named(lacks)} missing")
    if apart := sorted(misshaped):
        raise ValueError(f"{what} is damaged: {named(apart)} of another shape than its config.json")
    if unread := sorted(name for name in extra if not name.endswith("position_ids")):
        logger.warning("%s has more than its config.json asks for: %s not read", what, named(unread))


def misshaped(network: nn.Module, held: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of the weights of these shapes those, with their shapes, that the network has by that name in another."""
    expected = network.state_dict()
    return [
        f"{name} {shape}" for name, shape in held.items() if name in expected and tuple(expected[name].shape) != shape
    ]


def check_sizes(config: Mapping[str, Any], what: str) -> None:
    """ValueError for a configuration that asks for sizes no model has."""
    for name, value in _numbers(config):
        most = MOST_LAYERS if "layers" in name else MOST_PIXELS if name in SIDES else LARGEST
        if abs(value) > most:
            raise ValueError(f"{what} asks for {name}={value} in its configuration; give {most} at most")


def check_asked(network: nn.Module, held: int, what: str) -> None:
    """ValueError for a network (on the meta device) that is far larger than the weights for it."""
    asked = sum(weight.numel() for weight in network.parameters())
    if asked > held + SPARE:
        raise ValueError(
            f"{what} asks for {asked:,} numbers in its config.json, and its files hold {held:,}; "
            "correct the one or fetch the other again"
        )


def _numbers(config: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration, however deep, by the name it stands under."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _numbers(value, str(key))
    elif isinstance(config, list):
        for each in config:
            yield from _numbers(each, name)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield name, config
