# SPDX-License-Identifier: MIT
"""Label smoothing is told from the gradient in every state of training, and nothing else for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpnopt.recognition import Recogniser

SEEDS = range(10)
STATES = ("before", "optimum", "surer")


def trained(classes: int, smoothing: float, rows: int, state: str, seed: int) -> list[Tensor]:
    """Logits as before training, near the smoothed optimum, or surer than it; the labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=g)
    z = torch.randn(rows, classes, generator=g).double()
    if state == "before":
        return [0.05 * z, y]
    others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    best = math.log((1 - smoothing) / smoothing) + 0.4 * torch.randn(rows, generator=g)
    odds = best if state == "optimum" else 12 * torch.rand(rows, generator=g)
    return [z.scatter(1, y[:, None], (others + odds)[:, None]), y]


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.1, reduction="none")


#: Losses of smoothed labels that are no cross-entropy with one w for all.
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "temperature": lambda z, y: ce(z / 2, y).mean(),
    "weights": lambda z, y: (torch.linspace(0.5, 1.5, len(z)) * ce(z, y)).mean(),
    "mixup": lambda z, y: (0.7 * ce(z, y) + 0.3 * ce(z, y.roll(1))).mean(),
    "focal": lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None])[:, 0]) ** 2 * ce(z, y)).mean(),
    "penalty": lambda z, y: ce(z, y).mean() + 1e-3 * z.square().mean(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("classes, smoothing, rows", [(10, 0.1, 32), (2, 0.2, 32), (50, 0.3, 4)])
def test_told_whatever_the_net_has_learnt(
    classes: int, smoothing: float, rows: int, state: str, dtype: torch.dtype
) -> None:
    """A sample that is surer of its label than 1 - s has its smallest gradient elsewhere."""
    for seed in SEEDS:
        z, y = trained(classes, smoothing, rows, state, seed)
        z = z.to(dtype).requires_grad_()
        (G,) = torch.autograd.grad(3 * F.cross_entropy(z, y, label_smoothing=smoothing), z)
        cost = Recogniser("auto")(z.detach(), G, -1, rows)
        assert cost is not None
        assert (cost.w * rows / 3 - 1).abs().max() < 1e-4


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("classes", [2, 10])
def test_what_only_looks_like_it_is_not_taken_for_it(name: str, classes: int, state: str) -> None:
    for seed in SEEDS:
        z, y = trained(classes, 0.1, 32, state, seed)
        (G,) = torch.autograd.grad(OTHERS[name](z.requires_grad_(), y), z)
        assert Recogniser("auto")(z.detach(), G, -1, 32) is None
