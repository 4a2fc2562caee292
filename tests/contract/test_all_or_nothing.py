# SPDX-License-Identifier: MIT
"""An exception inside a step leaves weights, buffers, state and randomness as before it."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from oracles.common import (
    assert_same,
    assert_unchanged,
    data,
    generators,
    iterate,
    mlp,
    snapshot,
)

LR = 0.7
quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


def backward(model: nn.Module, seed: int = 0) -> None:
    x, y = data(seed)
    F.cross_entropy(model(x), y).backward()


class Bomb(nn.Module):
    """Fails on the chosen call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.fatal = 0, -1
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        torch.rand(3), np.random.rand(), random.random()
        if self.calls == self.fatal:
            raise RuntimeError("boom")
        return x


def state_of(opt: DDPNOpt) -> list[Tensor]:
    tensors: list[Tensor] = []

    def walk(node: object) -> None:
        if isinstance(node, Tensor):
            tensors.append(node.clone())
        elif isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                walk(value)

    walk(opt.state_dict())
    return tensors


@quiet
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
@pytest.mark.parametrize("value", ["moreau", "low_rank"])
@pytest.mark.parametrize("place", [2, 4, 5])
def test_all_or_nothing(curvature: str, value: str, place: int) -> None:
    base, bomb = mlp(), Bomb()
    model = nn.Sequential(*base[:place], bomb, *base[place:])
    twin = copy.deepcopy(model)

    def make(m: nn.Module) -> DDPNOpt:
        return DDPNOpt(m, lr=0.05, momentum=0.5, curvature=curvature, value=value)

    opt, other = make(model), make(twin)
    iterate(model, opt, range(2))
    iterate(twin, other, range(2))
    opt.zero_grad()
    backward(model, 2)
    bomb.fatal = bomb.calls + 1
    before, buffers, rng = snapshot(model), state_of(opt), generators()
    gradients = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        opt.step()
    assert_unchanged(model, before)
    assert generators() == rng
    for a, b in zip(state_of(opt), buffers, strict=True):
        assert torch.equal(a, b)
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, g)
    bomb.fatal = -1
    model.zero_grad()
    iterate(model, opt, [3, 4])
    iterate(twin, other, [3, 4])
    assert_same(base, nn.Sequential(*[m for m in twin if not isinstance(m, Bomb)]), 1e-14)


@quiet
def test_forward_that_raises_leaves_nothing_behind() -> None:
    base, bomb = mlp(), Bomb()
    model, twin = nn.Sequential(*base[:4], bomb, base[4]), mlp()
    opt, other = DDPNOpt(model, lr=LR), DDPNOpt(twin, lr=LR)
    bomb.fatal = 1
    with pytest.raises(RuntimeError, match="boom"):
        model(data(5)[0])
    iterate(model, opt, range(2))
    iterate(twin, other, range(2))
    assert_same(base, twin, 1e-15)


@quiet
def test_rollout_does_not_touch_gradients_or_grad_mode() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR)
    backward(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    assert torch.is_grad_enabled()
    opt.step()
    assert torch.is_grad_enabled()
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, g)
        assert p.requires_grad and p.is_leaf


def test_without_type_checks() -> None:
    """The tests that watch Python's generator, where no type checker draws from it."""
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_all_or_nothing.py", "test_rollout.py")]
    chosen = "test_all_or_nothing[2-moreau or test_randomness"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, *files]
    command += ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    run = subprocess.run(command, cwd=here.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "8 passed" in run.stdout
