# SPDX-License-Identifier: MIT
"""Feedback around an optimizer agrees with the same curvature, and with what it should feed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from ddpnopt import DDPNOpt, Feedback
from ddpnopt.curvature import AdamW, RMSprop
from ddpnopt.narrowed import Inner
from ddpnopt.updates import Update
from ddpnopt.wrapped import Wrapped
from wrapped.common import batch, dense

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

PAIRS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "adamw": (optim.AdamW, {"weight_decay": 0.1}, {"curvature": AdamW(), "weight_decay": 0.1}),
    "rmsprop": (
        optim.RMSprop,
        {"weight_decay": 0.1},
        {"curvature": RMSprop(), "weight_decay": 0.1},
    ),
    "rmsprop momentum": (
        optim.RMSprop,
        {"momentum": 0.5},
        {"curvature": RMSprop(), "momentum": 0.5},
    ),
    "sgd": (
        optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.01},
        {"curvature": "identity", "momentum": 0.9, "weight_decay": 0.01},
    ),
}


@pytest.mark.parametrize("depth", [True, "open_loop"])
@pytest.mark.parametrize("kind", PAIRS)
def test_the_same_as_the_own_curvature(kind: str, depth: Any) -> None:
    cls, options, own = PAIRS[kind]
    lr = 0.5 if kind == "sgd" else 0.05
    results = []
    for wrapped in (True, False, None):
        model = dense().double()
        opt: optim.Optimizer = cls(model.parameters(), lr=lr, **options)
        if wrapped:
            opt = Feedback(model, opt, feedback=depth)
        elif wrapped is False:
            opt = DDPNOpt(model, lr=lr, feedback=depth, **own)
        for number in range(30):
            x, y = batch(model, number)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert float((results[0] - results[2]).abs().max()) > 1e-3  # feedback did something


def rule(kind: str, v: Tensor, plain: Tensor, d: Tensor) -> Tensor:
    """The second moment after one step on max(gbar^2, d^2), written out."""
    fed = torch.maximum(plain**2, d**2)
    if kind == "Adagrad":
        return v + fed
    if kind == "Adamax":
        return torch.maximum(0.999 * v, fed.sqrt() + 1e-8)
    decay = {"Adam": 0.999, "RMSprop": 0.99, "Adadelta": 0.9}[kind]
    return decay * v + (1 - decay) * fed


MOMENTS = {
    "Adam": "exp_avg_sq",
    "RMSprop": "square_avg",
    "Adagrad": "sum",
    "Adadelta": "square_avg",
    "Adamax": "exp_inf",
}


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", MOMENTS)
def test_the_second_moment_sees_the_larger_gradient(kind: str, decay: float) -> None:
    """From the first step on; the first moment and the step itself see d alone."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    options = {} if kind == "Adagrad" and not decay else {"weight_decay": decay}
    optimizer = getattr(optim, kind)([p], lr=0.1, **options)
    v = torch.zeros_like(p)
    m = torch.zeros_like(p)
    for count in range(1, 4):
        plain, d = torch.randn(2, 4, 3, dtype=torch.float64)
        wrapped = Wrapped([Inner.of(optimizer)], {})
        before = p.detach().clone()
        with torch.no_grad():
            wrapped.apply([Update(p, d, plain=plain, follows=True)])
        plain, d = plain + decay * before, d + decay * before
        v = rule(kind, v, plain, d)
        state = optimizer.state[p]
        torch.testing.assert_close(state[MOMENTS[kind]], v, rtol=1e-12, atol=1e-14)
        if kind == "Adam":
            m = 0.9 * m + 0.1 * d
            root = (v / (1 - 0.999**count)).sqrt() + 1e-8
            step = 0.1 * m / (1 - 0.9**count) / root
            torch.testing.assert_close(p.detach(), before - step, rtol=1e-12, atol=1e-12)
