"""A network's call as a tracer takes it: tensors in, tensors out.

Nothing here knows who traces (`gen.openvino_runtime`, `gen.compile_runtime`), nor rows, samplers and families.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gen.attention.texts import Handed, Texts


@dataclass(frozen=True)
class Call:
    """What a network is handed. Every tensor's first axis is the row."""

    leaves: Sequence[Any]
    layout: TreeSpec

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Arguments of a call."""
        return cls(*tree_flatten((tuple(args), dict(kwargs))))

    @cached_property
    def given(self) -> list[Tensor]:
        """The tensors, in their order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def texts(self) -> Texts | None:
        """Which text each row reads, and its keys and values; None: it is not handed over so."""
        found = [leaf for leaf in self.leaves if isinstance(leaf, Texts)]
        assert len(found) <= 1, "pictures seen beside the text are refused"
        return found[0] if found else None

    @property
    def rows(self) -> int:
        """How many."""
        (rows,) = {len(tensor) for tensor in self.given}
        return rows

    @property
    def kind(self) -> Hashable:
        """What calls have in common that are traced as one: all but their numbers, their rows and their texts."""
        return (repr(self.layout), *(kind_of(leaf) for leaf in self.leaves))

    @property
    def takes_gradient(self) -> bool:
        """Whether torch has to note what is computed."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.given)


def stand_in(network: nn.Module, answer: Callable[[Call], Any]) -> None:
    """Let `answer` stand in a network's place; where torch has to note what is computed, ask the network itself."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = Call.of(args, kwargs)
        return type(network).forward(network, *args, **kwargs) if call.takes_gradient else answer(call)

    network.forward = forward


def is_stood_in(network: nn.Module) -> bool:
    """Whether something stands in a network's place."""
    return "forward" in vars(network)


def kind_of(leaf: object) -> Hashable:
    """What the network that is traced depends on, of one of its arguments."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape[1:]
    return Shapes.of(leaf) if isinstance(leaf, Texts) else leaf


@dataclass(frozen=True)
class Shapes:
    """What all texts of a network have in common; it keeps none of them."""

    pairs: tuple[torch.Size, ...]  # of each layer's keys and values (2, heads, L, d)

    @classmethod
    def of(cls, texts: Texts) -> Shapes:
        """Those of the first, as of any."""
        return cls(tuple(pair.shape for pair in texts.pairs[0]))


class Flat(nn.Module):
    """A network as a tracer reads it, for calls of one kind."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        leaves = [Shapes.of(leaf) if isinstance(leaf, Texts) else leaf for leaf in call.leaves]
        self.call_layout = CallLayout([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], call.layout)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """`given` are all tensors that the network is handed, in their order, then what the layers read of a text."""
        tensors = iter(given)
        leaves = [next(tensors) if one is None else one[0] for one in self.call_layout.fixed]
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Shapes):
                leaves[place] = Handed.of(next(tensors), leaf.pairs)
        args, kwargs = tree_unflatten(leaves, self.call_layout.layout)
        answers, self.call_layout.answer = tree_flatten(type(self.network).forward(self.network, *args, **kwargs))
        return tuple(answers)


@dataclass(eq=False)
class CallLayout:
    """How a network is handed its tensors, and how it hands over its own."""

    fixed: list[tuple[Any] | None]  # what stands beside the tensors; None: a tensor's place
    layout: TreeSpec
    answer: TreeSpec | None = None  # None: it has not been asked yet
