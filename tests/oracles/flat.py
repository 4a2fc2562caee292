# SPDX-License-Identifier: MIT
"""Chains of layers and their parameters as flat vectors: the oracles' common ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Function = Callable[[Tensor], Tensor]


class Chain(nn.Module):
    """Layers that run one after another, each followed by a parameter-free function."""

    def __init__(self, layers: Sequence[nn.Module], after: Sequence[Function]) -> None:
        """Store the layers and the functions that follow them."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.after = list(after)

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        for layer, after in zip(self.layers, self.after, strict=True):
            x = after(layer(x))
        return x


def flatten(layer: nn.Module) -> Tensor:
    """All parameters of a layer in one vector u."""
    return torch.cat([p.detach().reshape(-1) for p in layer.parameters()])


def unflatten(layer: nn.Module, u: Tensor) -> dict[str, Tensor]:
    """The inverse of ``flatten``, by parameter name."""
    parts, at = {}, 0
    for name, p in layer.named_parameters():
        parts[name] = u[at : at + p.numel()].reshape(p.shape)
        at += p.numel()
    return parts


def apply(layer: nn.Module, u: Tensor, x: Tensor) -> Tensor:
    """The pre-activation g(x, u) of a batch."""
    return functional_call(layer, unflatten(layer, u), (x,))


def flat_parameters(model: Chain) -> list[Tensor]:
    """The flat parameter vector of every layer of a chain."""
    return [flatten(layer) for layer in model.layers]


class Inner:
    """SGD or RMSprop on flat vectors, with the order of operations of torch.optim.

    Args:
        lr: Learning rate.
        momentum: Heavy-ball factor: of d for SGD, of M^-1 d for RMSprop.
        curvature: "identity" or "rmsprop".
        alpha: Decay of the second moment.
        eps: Added to its root.
    """

    def __init__(
        self,
        lr: float,
        momentum: float = 0.0,
        curvature: str = "identity",
        alpha: float = 0.99,
        eps: float = 1e-8,
    ) -> None:
        """Start without state."""
        self.lr, self.momentum, self.curvature = lr, momentum, curvature
        self.alpha, self.eps = alpha, eps
        self.v: dict[int, Tensor] = {}
        self.buffer: dict[int, Tensor] = {}

    @property
    def gain(self) -> float:
        """The step's size over the momentum's life."""
        return self.lr / (1.0 - self.momentum)

    def moment(self, t: int, square: Tensor) -> Tensor:
        """The second moment of layer t fed with this step's squares (not stored)."""
        return self.alpha * self.v.get(t, torch.zeros_like(square)) + (1 - self.alpha) * square

    def diagonal(self, v: Tensor) -> Tensor:
        """M's diagonal for a second moment v."""
        return torch.ones_like(v) if self.curvature == "identity" else v.sqrt() + self.eps

    def update(self, t: int, u: Tensor, d: Tensor, m: Tensor) -> Tensor:
        """The new parameters of layer t."""
        step = d / m if self.curvature == "rmsprop" else d
        if self.momentum:
            step = self.momentum * self.buffer[t] + step if t in self.buffer else step.clone()
            self.buffer[t] = step
        return u - self.lr * step
