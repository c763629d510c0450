"""One call of a model that has several networks: each evaluation is answered by the one that it asks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clip_core.device import to_device
from gen.conditioning import Conditions, NetworkName
from gen.rows import Network


def dispatched(networks: Mapping[NetworkName, Network], x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """The answers to M evaluations, in their order; each network is asked once, and one that nobody asks, never."""
    if len(conditions.places) == 1:
        (only,) = conditions.places
        return networks[only](x, timestep, conditions)
    answers = []
    for name, here in conditions.places.items():
        at = to_device(torch.tensor(here), x.device)
        answers.append(networks[name](x[at], timestep[at], conditions.parts[name]))
    order = torch.tensor([place for here in conditions.places.values() for place in here])
    return torch.cat(answers)[to_device(order.argsort(), x.device)]
