# SPDX-License-Identifier: MIT
"""Sparse gradients around optimizers that have a second moment, and those that take none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt import Feedback, open_loop

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.DDPNOptWarning")
Optimizers = list[torch.optim.Optimizer]


class Net(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4, sparse=sparse)
        self.hidden, self.last = nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.hidden(self.embedding(words).flatten(1))))


def adagrad(net: Net) -> Optimizers:
    return [torch.optim.Adagrad(net.parameters(), 0.1)]


def sparse_adam(net: Net) -> Optimizers:
    dense = [*net.hidden.parameters(), *net.last.parameters()]
    lazy = torch.optim.SparseAdam(net.embedding.parameters(), 0.05)
    return [lazy, torch.optim.AdamW(dense, 0.05)]


def sgd(net: Net) -> Optimizers:
    return [torch.optim.SGD(net.parameters(), 0.3)]


def flat(z: torch.Tensor) -> torch.Tensor:
    """A loss without curvature: every coefficient is 1."""
    return z.new_zeros(*z.shape, 1)


def train(net: Net, make: Callable[[Net], Optimizers], how: str, terminal: Any = "auto") -> Net:
    inner = make(net)
    steps: Any = inner
    if how == "feedback":
        steps = [Feedback(net, inner, terminal=terminal)]
    elif how == "open_loop":
        open_loop(net, inner, terminal=terminal)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(7, (8, 3), generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        for one in steps:
            one.zero_grad()
        F.cross_entropy(net(words), labels).backward()
        for one in steps:
            one.step()
    return net


def same(net: Net, twin: Net) -> bool:
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("how", ["feedback", "open_loop"])
@pytest.mark.parametrize("make", [adagrad, sparse_adam, sgd])
def test_without_damping_it_is_the_optimizer_to_the_bit(make: Any, how: str) -> None:
    assert same(train(Net(True), make, how, flat), train(Net(True), make, "plain"))


@pytest.mark.parametrize("how", ["feedback", "open_loop"])
@pytest.mark.parametrize("make", [adagrad, sparse_adam, sgd])
def test_the_dense_layers_have_feedback(make: Any, how: str) -> None:
    robust, plain = train(Net(True), make, how), train(Net(True), make, "plain")
    assert (robust.last.weight - plain.last.weight).abs().max() > 1e-5
    assert robust.embedding.weight.isfinite().all()


@pytest.mark.parametrize("how", ["feedback", "open_loop"])
def test_an_optimizer_that_takes_none_says_so_itself(how: str) -> None:
    """Torch's own words: it names what to do better than anybody else could."""

    def adamw(net: Net) -> Optimizers:
        return [torch.optim.AdamW(net.parameters(), 0.1)]

    net = Net(True)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        train(net, adamw, how)
    if how == "feedback":  # all or nothing
        pairs = zip(before, net.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
