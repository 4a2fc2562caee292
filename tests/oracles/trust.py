# SPDX-License-Identifier: MIT
"""SGD or RMSprop on flat vectors, every unit's step bounded by its weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from oracles.flat import Inner


def units(layer: nn.Module) -> Tensor:
    """For every flat parameter of a layer the number of its unit; the bias is the last one."""
    weight = layer.weight
    rows = torch.arange(len(weight)).repeat_interleave(weight[0].numel())
    return torch.cat([rows, torch.full((len(layer.bias),), len(weight))])


class Trusted(Inner):
    """M_0 max(1, eta |M_0^-1 g|_u / (tau |u|)).

    Args:
        weights: The flat parameters as they are.
        layers: The chain's layers.
        tau: Bound; None: log(2) over the number of layers.
        rest: `Inner`'s.
    """

    def __init__(
        self,
        weights: Callable[[], list[Tensor]],
        layers: list[nn.Module],
        tau: float | None,
        *rest: object,
    ) -> None:
        super().__init__(*rest)
        self.weights, self.units = weights, [units(layer) for layer in layers]
        self.tau = math.log(2) / len(layers) if tau is None else tau

    def moment(self, t: int, square: Tensor) -> Tensor:
        own = self.v[t][0] if t in self.v else torch.zeros_like(square)
        own = self.alpha * own + (1 - self.alpha) * square
        step = self.gain * square.sqrt() / super().diagonal(own)
        factor = self._lengths(t, step) / (
            self.tau * self._lengths(t, self.weights()[t]).clamp(1e-3)
        )
        return torch.stack([own, factor.clamp(1.0)[self.units[t]]])

    def diagonal(self, v: Tensor) -> Tensor:
        return super().diagonal(v[0]) * v[1]

    def update(self, t: int, u: Tensor, d: Tensor, m: Tensor) -> Tensor:
        step = d / m
        if self.momentum:
            step = self.momentum * self.buffer[t] + step if t in self.buffer else step
            self.buffer[t] = step
        return u - self.lr * step

    def _lengths(self, t: int, u: Tensor) -> Tensor:
        sums = torch.zeros(int(self.units[t].max()) + 1, dtype=u.dtype)
        return sums.index_add(0, self.units[t], u.square()).sqrt()
