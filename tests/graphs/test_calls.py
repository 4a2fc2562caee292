# SPDX-License-Identifier: MIT
"""Which call of which module is run again: losses around it, several calls of one encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_same
from oracles.graph_parts import linear


class Encoder(nn.Module):
    """A residual block between two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = linear(4, 4), linear(4, 4), linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Stem, block, head."""
        h = torch.tanh(self.a(x))
        made: Tensor = self.c(h + torch.tanh(self.b(h)))
        return made


class WithLoss(nn.Module):
    """Computes its loss outside the module that has all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        return F.cross_entropy(2 * self.encoder(x) / 2, y)


class Twins(nn.Module):
    """One encoder, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """The product of both codes."""
        made: Tensor = self.encoder(x) * torch.sigmoid(self.encoder(other))
        return made


class TwinsByHand(Twins):
    """The same, in the forward pass of one module."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """The product of both codes."""
        first, second = (Encoder.forward(self.encoder, one) for one in (x, other))
        return first * torch.sigmoid(second)


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return x, other, torch.randint(3, (6,), generator=generator)


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_loss_around_the_call(value: object) -> None:
    outer = WithLoss()
    inner = copy.deepcopy(outer.encoder)
    first, second = (DDPNOpt(m, lr=0.4, value=value) for m in (outer, inner))
    for seed in range(3):
        x, _, y = batch(seed)
        first.zero_grad()
        outer(x, y).backward()
        first.step()
        second.zero_grad()
        F.cross_entropy(inner(x), y).backward()
        second.step()
    assert_same(outer.encoder, inner)


@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_an_encoder_called_twice(value: object) -> None:
    """Once it is known that one call is not everything, what calls it is run again."""
    model = Twins()
    opt = DDPNOpt(model, lr=0.4, value=value)
    x, other, y = batch(0)
    start = copy.deepcopy(model)
    with pytest.warns(DDPNOptWarning, match="behind the call of 'encoder'.* the open loop's"):
        F.cross_entropy(model(x, other), y).backward()
        opt.step()
    open_loop = DDPNOpt(start, lr=0.4, value=value, feedback="open_loop")
    F.cross_entropy(start(x, other), y).backward()
    open_loop.step()
    assert_same(model, start, 1e-12)

    twin = TwinsByHand()
    twin.load_state_dict(model.state_dict())
    theirs = DDPNOpt(twin, lr=0.4, value=value)
    for seed in (1, 2):
        x, other, y = batch(seed)
        for net, one in ((model, opt), (twin, theirs)):
            one.zero_grad()
            F.cross_entropy(net(x, other), y).backward()
            one.step()
    assert_same(model, twin)
