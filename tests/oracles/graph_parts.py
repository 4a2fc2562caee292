# SPDX-License-Identifier: MIT
"""What the graph oracles' nets are made of: layers, and functions between them."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

tanh = torch.tanh
add, mul = operator.add, operator.mul


def cat(*parts: Tensor) -> Tensor:
    """Along the features (or channels)."""
    return torch.cat(parts, 1)


def gate(x: Tensor, y: Tensor) -> Tensor:
    """x * sigmoid(y)."""
    return x * torch.sigmoid(y)


def split_gate(x: Tensor) -> Tensor:
    """GLU: one half gates the other."""
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(b)


def channel_gate(x: Tensor, y: Tensor) -> Tensor:
    """x (B, C, H, W) * sigmoid(y) (B, C)."""
    return x * torch.sigmoid(y)[:, :, None, None]


def over_positions(x: Tensor) -> Tensor:
    """Mean over all axes between the batch and the features."""
    return x.mean(1)


def pool(x: Tensor) -> Tensor:
    """Mean over the pixels."""
    return x.mean((2, 3))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, written out."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v


def linear(i: int, o: int, bias: bool = True) -> nn.Linear:
    """float64."""
    return nn.Linear(i, o, bias, dtype=torch.float64)


def conv(i: int, o: int, size: int = 3) -> nn.Conv2d:
    """float64, of the same size."""
    return nn.Conv2d(i, o, size, padding=size // 2, dtype=torch.float64)


def noise(*shape: int) -> Tensor:
    """Inputs of five samples."""
    return torch.randn(5, *shape, dtype=torch.float64)


def norm(width: int) -> nn.LayerNorm:
    """A LayerNorm whose weights are not all alike."""
    layer = nn.LayerNorm(width, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer
