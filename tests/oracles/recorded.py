# SPDX-License-Identifier: MIT
"""Small trainings that are run by the loop and from a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, STEPS = 4, 14
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, CLASSES)
        ),
        (5,),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        ),
        (2, 6, 6),
    ),
    "BatchNorm": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, CLASSES)
        ),
        (5,),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "closed loop": {"lr": 0.5},
    "open loop": {"lr": 0.5, "feedback": "open_loop"},
    "off": {"lr": 0.1, "feedback": False},
    "no weight gradients": {"lr": 0.5, "weight_gradients": False},
    "momentum, decay": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "rmsprop": {"lr": 1e-2, "curvature": "rmsprop", "momentum": 0.5},
    "adamw": {"lr": 1e-2, "curvature": "adamw", "weight_decay": 0.1},
    "adamw, open loop": {"lr": 1e-2, "curvature": "adamw", "feedback": "open_loop"},
    "low_rank": {"lr": 0.5, "value": "low_rank"},
    "gauss_newton": {"lr": 0.5, "value": "gauss_newton"},
    "dense": {"lr": 0.5, "value": "dense"},
}


def batches(
    shape: tuple[int, ...], steps: int = STEPS, samples: int = 6
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(samples, *shape, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (samples,), generator=generator),
        )
        for _ in range(steps)
    ]


def model(name: str = "dense") -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    return build().double(), shape


def dense_net(widths: list[int]) -> nn.Module:
    """Three inputs, layers of these widths with Tanh, always with the same weights."""
    torch.manual_seed(0)
    sizes = [3, *widths, CLASSES]
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*(m for one in layers for m in (one, nn.Tanh()))).double()


def plain(opt: torch.optim.Optimizer, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
    return loss.detach()


def on(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(net(x), y)


def apart(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


INNER: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
}
KRONECKER: dict[str, dict[str, Any]] = {
    "closed loop": {},
    "open loop": {"feedback": "open_loop"},
    "off": {"feedback": False},
    "momentum, decay": {"momentum": 0.9, "weight_decay": 0.01},
    "low_rank": {"value": "low_rank"},
}


def counts(opt: torch.optim.Optimizer) -> list[dict[str, int]]:
    return [
        {name: v for name, v in state.items() if isinstance(v, int)} for state in opt.state.values()
    ]
