# SPDX-License-Identifier: MIT
"""Readers that users register: states made before the first step begin as the optimizer's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, optim
from torch.nn import functional as F

from ddpnopt import Feedback
from ddpnopt.inner import READERS
from ddpnopt.inner.moments import Adam
from wrapped.common import batch, dense


class Averaged(optim.Optimizer):
    """RMSprop-like steps of z, whose average with the weights is where gradients are taken."""

    def __init__(self, params: Any, lr: float, decay: float, early: bool) -> None:
        own = {"lr": lr, "betas": (0.0, 0.9), "eps": 1e-8, "weight_decay": decay, "amsgrad": False}
        super().__init__(params, {**own, "maximize": False})
        if early:
            for group in self.param_groups:
                for p in group["params"]:
                    self._begin(p)

    def _begin(self, p: Tensor) -> None:
        zero = torch.zeros_like(p)
        self.state[p].update(step=0, z=p.detach().clone(), exp_avg_sq=zero)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self._begin(p)
                state = self.state[p]
                state["step"] += 1
                g = p.grad + group["weight_decay"] * p
                state["exp_avg_sq"].mul_(0.9).addcmul_(g, g, value=0.1)
                v = state["exp_avg_sq"] / (1 - 0.9 ** state["step"])
                state["z"].sub_(group["lr"] * g / (v.sqrt() + 1e-8))
                p.lerp_(state["z"], 1.0 if state["step"] == 1 else 0.5)


@pytest.fixture
def registered() -> Iterator[None]:
    READERS[Averaged] = Adam()
    yield
    del READERS[Averaged]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("depth", [True, "open_loop", False])
def test_a_state_that_holds_weights_starts_with_them(
    registered: None, depth: Any, decay: float
) -> None:
    found = []
    for early in (True, False):
        model = dense()
        inner = Averaged(model.parameters(), 0.02, decay, early)
        opt = Feedback(model, inner, feedback=depth)
        for number in range(3):
            x, y = batch(model, number)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        found.append([p.detach().clone() for p in model.parameters()])
        found.append([inner.state[p]["z"] for p in model.parameters()])
    for first, second in ((found[0], found[2]), (found[1], found[3])):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
