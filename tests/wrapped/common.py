# SPDX-License-Identifier: MIT
"""Small nets, the plain loop, and the four ways of putting feedback into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import Feedback, open_loop

Make = Callable[[nn.Module], Any]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def conv() -> nn.Module:
    torch.manual_seed(0)
    front = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*front, nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(model: nn.Module, number: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    p = next(model.parameters())
    shape = (6,) if p.dim() == 2 else (1, 4, 4)
    x = torch.randn(size, *shape, generator=generator)
    return x.to(p.dtype), torch.arange(size) % 3


def ones(z: Tensor) -> Tensor:
    """A terminal cost without curvature: every coefficient is 1."""
    return z.new_zeros(*z.shape, 1)


def plain(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Nothing around the optimizers."""


WAYS: dict[str, Callable[[nn.Module, list[torch.optim.Optimizer]], Any]] = {
    "off": lambda m, o: Feedback(m, o, feedback=False),
    "closed": lambda m, o: Feedback(m, o, terminal=ones),
    "open": lambda m, o: Feedback(m, o, terminal=ones, feedback="open_loop"),
    "handle": lambda m, o: open_loop(m, o, terminal=ones),
}


def train(
    net: Callable[[], nn.Module], make: Make, way: Callable[..., Any] = plain, steps: int = 4
) -> tuple[list[Tensor], str]:
    """The plain loop with a change of rate; weights, buffers and states, and the groups."""
    model = net()
    made = make(model)
    optimizers = made if isinstance(made, list) else [made]
    around = way(model, optimizers)
    stepping = [around] if isinstance(around, torch.optim.Optimizer) else optimizers
    for number in range(steps):
        x, y = batch(model, number)
        for one in stepping:
            one.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for one in stepping:
            one.step()
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] *= 0.9
    found = [t.detach().clone() for t in model.state_dict().values()]
    for one in optimizers:
        for state in one.state.values():
            found += [t.detach().clone() for t in state.values() if isinstance(t, Tensor)]
    groups = [
        {k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups
    ]
    return found, str(groups)


def assert_equal(ours: tuple[list[Tensor], str], theirs: tuple[list[Tensor], str]) -> None:
    """To the last bit."""
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)
