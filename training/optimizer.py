"""The optimiser of a network: AdamW, or Muon for its hidden matrices and AdamW for the rest.

Knows networks as modules with parameters; the loop knows one `torch.optim.Optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipe import TrainSection

MOMENTUM = 0.95
NARROWEST = 16  # channels; a layer narrower on either side speaks to the outside (pixels, latents) and is not hidden
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic, five times
_RMS = 0.2  # of an entry of AdamW's update, which Muon's is brought to (Liu et al. 2025)


def make_optimizer(network: nn.Module, config: TrainSection, *, fused: bool) -> torch.optim.Optimizer:
    """Over the parameters that ask for gradients; weight decay acts on matrices, not on biases, norms and scales.

    `fused`: AdamW's fused kernel, far quicker than the plain one on a CPU.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    hidden = {id(weight) for weight in _hidden(network)} if config.optimizer == "muon" else set()
    rest = [parameter for parameter in trained if id(parameter) not in hidden]
    adamw = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in rest if parameter.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
        ],
        config.learning_rate,
        config.betas,
        fused=fused,
    )
    if not hidden:
        return adamw
    muon = Muon([each for each in trained if id(each) in hidden], config.learning_rate, config.weight_decay)
    return CombinedOptimizer(muon, adamw)


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is the nearest orthogonal matrix (Jordan et al. 2024, "Muon").

    A convolution's kernel counts as the matrix (out, in * height * width), which torch.optim.Muon refuses. Scaled as by
    Liu et al. 2025 ("Muon is scalable for LLM training"), so that AdamW's learning rate and weight decay serve it.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape are brought to orthogonality at once."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                ahead = parameter.grad.lerp(state["momentum"], MOMENTUM).flatten(1)  # Nesterov's
                alike.setdefault(ahead.shape, []).append((parameter, ahead))
            for shape, members in alike.items():
                updates = newton_schulz(torch.stack([ahead for _, ahead in members]))
                size = group["lr"] * _RMS * max(shape) ** 0.5
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-size)


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers over one network as one: their groups, and their states, are this one's."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved by an equal one."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step of each."""
        for part in self.parts:
            part.step()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last


def newton_schulz(matrices: Tensor) -> Tensor:
    """(N, m, n) -> about U V^T of each one's singular value decomposition, by a Newton-Schulz iteration in bfloat16.

    Its singular values end between 0.7 and 1.2, which is near enough (Jordan et al. 2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _hidden(network: nn.Module) -> list[Tensor]:
    """Weights of linear layers and convolutions that are wide on both sides; embeddings are neither."""
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [weight for weight in weights if weight.requires_grad and min(weight.shape[:2]) >= NARROWEST]
