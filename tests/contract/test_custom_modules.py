# SPDX-License-Identifier: MIT
"""Users' own modules, served by automatic differentiation, and batches with unusual lives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import EKFAC, KFAC, DDPNOpt
from ddpnopt.errors import DDPNOptWarning
from oracles.common import assert_same

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double()
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Scale(nn.Module):
    """Factors of the coordinates, and of samples that do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.register_buffer("constant", torch.linspace(1.0, 2.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor * self.constant


class InPlace(Scale):
    """Overwrites the state that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.constant) * self.factor


class Noisy(Scale):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.factor, 0.3, self.training)


class Centred(Scale):
    """Mixes samples."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.factor


def around(module: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), module, nn.Linear(6, 3)).double()


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        opt.step()


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("make", [DDPNOpt, KFAC, EKFAC])
def test_a_buffer_that_autograd_saved(make: Any) -> None:
    """Certifying the rule puts buffers back without touching what a graph has saved."""
    model = around(Scale())
    opt = make(model, lr=0.02)
    before = model[1].constant.data_ptr()
    train(model, opt)
    assert model[1].constant.data_ptr() == before
    assert "1" in [layer.name for layer in opt.last_step.layers] or make is not DDPNOpt


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_a_module_that_overwrites_its_input(feedback: Any) -> None:
    """The state is gone when the module returns: a plain step, said once, feedback around it."""
    model = around(InPlace())
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=0.3, feedback=feedback)
    with pytest.warns(DDPNOptWarning, match="'1' take the borrowed optimizer's plain step"):
        train(model, opt, 1)
    assert opt.last_step is not None
    assert [layer.name for layer in opt.last_step.layers] == ["0", "2"]
    train(twin, torch.optim.SGD(twin.parameters(), 0.3), 1)
    torch.testing.assert_close(model[1].factor, twin[1].factor, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make", [KFAC, EKFAC])
@pytest.mark.parametrize("kind", [Noisy, Centred])
def test_a_doubted_rule_feeds_no_kronecker_statistics(make: Any, kind: type[Scale]) -> None:
    """A sample's own gradient has no meaning there: the parameter takes its gradient's step."""
    model = around(kind())
    twin = copy.deepcopy(model)
    lr, opt = 0.02, make(model, lr=0.02)
    torch.manual_seed(3)
    train(model, opt, 1)
    assert "fisher" not in opt.state[model[1].factor]
    torch.manual_seed(3)
    F.cross_entropy(twin(X), Y).backward()
    step = (twin[1].factor - model[1].factor).detach() / lr
    torch.testing.assert_close(step, twin[1].factor.grad, rtol=1e-9, atol=1e-12)


def test_a_bias_unfrozen_later_starts_the_statistics_anew() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    opt = KFAC(model, lr=0.02)
    model[0].bias.requires_grad_(False)
    train(model, opt)
    assert opt.state[model[0].weight]["A"].shape[-1] == 5
    before = model[0].bias.detach().clone()
    model[0].bias.requires_grad_(True)
    train(model, opt)
    assert opt.state[model[0].weight]["A"].shape[-1] == 6
    assert not torch.equal(before, model[0].bias)


def test_groups_whose_rates_part() -> None:
    """Weight and bias are one matrix at equal rates, and two at different ones."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    opt = KFAC(model, lr=0.02, params=[{"params": weights}, {"params": biases}])
    train(model, opt)
    opt.param_groups[1]["lr"] = 0.0
    before = [b.detach().clone() for b in biases]
    train(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before, biases, strict=True))
    assert opt.state[weights[0]]["A"].shape[-1] == 5


def open_loop(model: nn.Module, lr: float) -> DDPNOpt:
    return DDPNOpt(model, lr=lr, feedback="open_loop")


@pytest.mark.parametrize("make", [DDPNOpt, open_loop, KFAC, EKFAC])
def test_an_empty_batch_moves_nothing(make: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    opt = make(model, lr=0.02)
    train(model, opt)
    before = copy.deepcopy(model)
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.cross_entropy(model(X[:0]), Y[:0], reduction="sum").backward()
        opt.step()
    assert_same(model, before)
