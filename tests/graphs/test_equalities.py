# SPDX-License-Identifier: MIT
"""What a graph must have in common with a chain and with torch's optimizers, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.common import assert_same, iterate, mlp
from oracles.graph_cases import problem, train
from oracles.graph_nets import GRAPHS, NETS, net

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

VALUES = {
    "moreau": Moreau(),
    "envelope": Moreau(strength=1.0),
    "low_rank": LowRank(),
    "gauss_newton": GaussNewton(),
}


class Written(nn.Module):
    """The layers of ``mlp`` called by hand, with Python variables between them."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.a, self.b, self.c = (copy.deepcopy(layers[k]) for k in (0, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        """The chain."""
        h = self.a(x)
        h = h.tanh()
        hidden = torch.tanh(self.b(h))
        return self.c(hidden)


class Joined(Written):
    """The same with a branch of the graph's form that is empty: a concatenation of one part."""

    def forward(self, x: Tensor) -> Tensor:
        """The chain."""
        parts = [self.a(x).tanh()]
        h = torch.cat(parts, 1)
        keep = h.view_as(h)
        return self.c(torch.tanh(self.b(keep)))


@pytest.mark.parametrize("form", [Written, Joined])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_chain_written_as_a_graph(
    form: type[Written], value: str, feedback: object, momentum: float
) -> None:
    chain = mlp(3)
    graph = form(chain)
    options = {"lr": 0.5, "momentum": momentum, "value": VALUES[value], "feedback": feedback}
    for model in (chain, graph):
        iterate(model, DDPNOpt(model, **options), range(4))
    for mine, other in zip(graph.parameters(), chain.parameters(), strict=True):
        assert torch.equal(mine, other)


class Block(nn.Module):
    """A residual block as a module of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """x + second(tanh(first(x)))."""
        return x + self.second(torch.tanh(self.first(x)))


class Flat(nn.Module):
    """Two blocks in one forward."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Stem, blocks, head."""
        stem, a, b, c, d, head = self.layers
        x = torch.tanh(stem(x))
        x = x + b(torch.tanh(a(x)))
        x = x + d(torch.tanh(c(x)))
        return head(x)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_nesting_of_modules_does_not_matter(value: str, feedback: object) -> None:
    widths = [(5, 4)] + [(4, 4)] * 4 + [(4, 3)]
    flat = Flat([nn.Linear(i, o, dtype=torch.float64) for i, o in widths])
    stem, a, b, c, d, head = copy.deepcopy(flat).layers
    nested = nn.Sequential(stem, nn.Tanh(), Block(a, b), Block(c, d), head)
    for model in (flat, nested):
        opt = DDPNOpt(model, lr=0.5, value=VALUES[value], feedback=feedback)
        iterate(model, opt, range(3))
    for mine, other in zip(nested.parameters(), flat.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", NETS)
def test_feedback_off_is_sgd(name: str) -> None:
    plain, inputs = net(name)
    mine = copy.deepcopy(plain)
    loss, *_ = problem(inputs, "cross_entropy")
    train(mine, inputs, loss, 3, lr=0.4, momentum=0.5, weight_decay=0.01, feedback=False)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.4, momentum=0.5, weight_decay=0.01)
    for _ in range(3):
        theirs.zero_grad()
        loss(plain(*inputs)).backward()
        theirs.step()
    assert_same(mine, plain)


@pytest.mark.parametrize("name", NETS)
def test_strength_zero_without_feedback_is_sgd(name: str) -> None:
    """S = 0 and q = 0: every coefficient is one, whatever the graph."""
    plain, inputs = net(name)
    mine = copy.deepcopy(plain)
    loss, *_ = problem(inputs, "cross_entropy")
    value = Moreau(strength=0.0, coupling=False)
    train(mine, inputs, loss, 2, lr=0.4, value=value, feedback="open_loop")
    theirs = torch.optim.SGD(plain.parameters(), lr=0.4)
    for _ in range(2):
        theirs.zero_grad()
        loss(plain(*inputs)).backward()
        theirs.step()
    assert_same(mine, plain, 1e-12)


@pytest.mark.parametrize("name", [build.__name__ for build in GRAPHS])
def test_small_rates_are_sgd(name: str) -> None:
    """The step's direction tends to the gradient, in proportion to the rate."""
    gaps = []
    for lr in (1e-3, 1e-4):
        mine, inputs = net(name)
        before = copy.deepcopy(mine)
        loss, *_ = problem(inputs, "cross_entropy")
        loss(before(*inputs)).backward()
        train(mine, inputs, loss, 1, lr=lr)
        pairs = zip(mine.parameters(), before.parameters(), strict=True)
        gaps.append(sum(float(((p - b).detach() / lr + b.grad).abs().sum()) for p, b in pairs))
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("name", ["identity_skip", "two_towers", "attention", "unrolled"])
def test_samples_in_another_order(name: str) -> None:
    first, inputs = net(name)
    second = copy.deepcopy(first)
    loss, *_ = problem(inputs, "cross_entropy")
    order = torch.tensor([3, 0, 4, 2, 1])
    back = order.argsort()
    train(first, inputs, loss, 2, lr=0.8)
    train(second, [x[order] for x in inputs], lambda z: loss(z[back]), 2, lr=0.8)
    assert_same(first, second, 1e-10)


@pytest.mark.parametrize("name", ["identity_skip", "two_towers", "attention", "interleaved"])
@pytest.mark.parametrize("value", ["moreau", "low_rank"])
def test_accumulated_passes_are_one_batch(name: str, value: str) -> None:
    """Their rollouts run side by side, each with its own tensors at the cuts."""
    whole, inputs = net(name)
    parts = copy.deepcopy(whole)
    y = torch.tensor([0, 2, 1, 1, 0])
    first = DDPNOpt(whole, lr=0.5, value=VALUES[value])
    second = DDPNOpt(parts, lr=0.5, value=VALUES[value])
    for _ in range(2):
        first.zero_grad()
        second.zero_grad()
        (F.cross_entropy(whole(*inputs), y, reduction="sum") / 5).backward()
        for rows in (slice(0, 2), slice(2, 5)):
            z = parts(*(x[rows] for x in inputs))
            (F.cross_entropy(z, y[rows], reduction="sum") / 5).backward()
        first.step()
        second.step()
    assert_same(whole, parts, 1e-10)


@pytest.mark.parametrize("name", ["identity_skip", "two_towers", "attention", "interleaved"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_without_weight_gradients(name: str, feedback: object) -> None:
    usual, inputs = net(name)
    lean = copy.deepcopy(usual)
    loss, *_ = problem(inputs, "cross_entropy")
    options = {"lr": 0.5, "value": Moreau(coupling=False), "feedback": feedback}
    train(usual, inputs, loss, 2, **options)
    train(lean, inputs, loss, 2, weight_gradients=False, **options)
    assert_same(usual, lean, 1e-10)
