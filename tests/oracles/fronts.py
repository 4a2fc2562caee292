# SPDX-License-Identifier: MIT
"""Nets with BatchNorm, and the plain autograd references of what lies in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt

LR, BATCH = 0.4, 12
DEPTHS = (True, "open_loop")


def mlp_bn() -> nn.Sequential:
    """BatchNorm between all layers; the boundary is the last layer's input."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 7),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.Linear(7, 4),
    ).double()


def last_bn() -> nn.Sequential:
    """BatchNorm is the last layer: the boundary is the output."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.BatchNorm1d(4)
    ).double()


def cnn_bn() -> nn.Sequential:
    """A convolution and two dense layers; the boundary is the first dense layer's input."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.Tanh(),
        nn.Linear(5, 4),
    ).double()


#: The model, and where its front ends.
NETS: dict[str, Any] = {"mlp": (mlp_bn, 6), "cnn": (cnn_bn, 5), "last": (last_bn, 5)}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (BATCH,), generator=generator)


def take(model: nn.Module, opt: torch.optim.Optimizer, seed: int = 0) -> None:
    opt.zero_grad()
    x, y = batch(seed)
    F.cross_entropy(model(x), y).backward()
    opt.step()


def coefficients(opt: DDPNOpt) -> Tensor:
    assert opt.last_step is not None and opt.last_step.front is not None
    coefficient = opt.last_step.front.coefficient
    assert coefficient is not None
    return coefficient


def weighted_gradients(model: nn.Module, c: Tensor, seed: int) -> None:
    """The gradient of the loss with each sample's share multiplied by its coefficient."""
    x, y = batch(seed)
    (F.cross_entropy(model(x), y, reduction="none") * c).mean().backward()


def front_of(model: nn.Sequential, end: int) -> list[nn.Parameter]:
    return list(model[:end].parameters())
