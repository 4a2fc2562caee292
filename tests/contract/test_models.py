# SPDX-License-Identifier: MIT
"""Chains with whatever lies between, other parametrised modules, sample mixing, non-chains."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import LowRank
from oracles.common import (
    CONVOLUTIONS,
    assert_params,
    assert_same,
    assert_unchanged,
    conv_chain,
    cross_entropy,
    distance,
    identity,
    input_for,
    iterate,
    snapshot,
    steps,
)
from oracles.dense_ddp import DenseDDP
from oracles.flat import Chain, Inner
from oracles.moreau_scalar import softmax_line
from oracles.moreau_step import MoreauStep

LR = 0.7
quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
FEEDBACKS = [True, "open_loop"]


@quiet
@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("k", range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("gram", ["exact", "auto"])
def test_convolution_options(place: str, k: int, gram: str) -> None:
    options = [CONVOLUTIONS[k], {"kernel_size": 1}]
    model = conv_chain(options if place == "first" else options[::-1])
    x = input_for(model, 3)
    _, loss, hessian = cross_entropy(x, 3)
    reference = DenseDDP(copy.deepcopy(model), Inner(LR))
    for _ in range(2):
        reference.step(x, loss, hessian)
    steps(model, x, loss, 2, lr=LR, value=LowRank(), gram=gram, terminal="cross_entropy")
    # A sketch is not exact: only that it runs and stays near.
    assert_params(model, reference.params, 0.2 if gram == "auto" else 1e-10)


def token_chain() -> Chain:
    """(B, T, d) through two layers, then the mean over T and a head."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3)]

    def mean(h: Tensor) -> Tensor:
        return torch.tanh(h).mean(1)

    return Chain(layers, [torch.tanh, mean, identity]).double()


def tokens() -> Tensor:
    return torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@quiet
@pytest.mark.parametrize("value", ["low_rank", "dense"])
def test_leading_dimensions(value: str) -> None:
    model, x = token_chain(), tokens()
    _, loss, hessian = cross_entropy(x, 3)
    reference = DenseDDP(copy.deepcopy(model), Inner(LR))
    for _ in range(2):
        reference.step(x, loss, hessian)
    steps(model, x, loss, 2, lr=LR, value=value)
    assert_params(model, reference.params)


def softmax_lines(y: Tensor) -> object:
    target = F.one_hot(y, 3).numpy()
    return lambda z: [softmax_line(a, b) for a, b in zip(z.numpy(), target, strict=True)]


@quiet
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_leading_dimensions_moreau(feedback: object) -> None:
    model, x = token_chain(), tokens()
    y, loss, _ = cross_entropy(x, 3)
    reference = MoreauStep(copy.deepcopy(model), Inner(LR), feedback=feedback is True)
    for _ in range(2):
        reference.step(x, loss, torch.full((4,), 0.25).double(), softmax_lines(y))
    steps(model, x, loss, 2, lr=LR, feedback=feedback)
    assert_params(model, reference.params, 1e-9)


class Folded(nn.Module):
    """The same net with T folded into the batch: dimension 0 a multiple of B."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = token_chain().layers

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = torch.tanh(self.layers[0](x.reshape(b * t, d)))
        h = torch.tanh(self.layers[1](h)).reshape(b, t, -1).mean(1)
        return self.layers[2](h)


@quiet
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("value", ["moreau", "low_rank", "gauss_newton", "dense"])
def test_folded_time(feedback: object, value: str) -> None:
    if feedback == "open_loop" and value != "moreau":
        feedback = True
    model, twin, x = Folded(), token_chain(), tokens()
    _, loss, _ = cross_entropy(x, 3)
    steps(model, x, loss, 2, lr=LR, value=value, feedback=feedback)  # type: ignore[arg-type]
    steps(twin, x, loss, 2, lr=LR, value=value, feedback=feedback)
    assert_same(model.layers, twin.layers, 1e-12)


class Functional(nn.Module):
    """Layers called out of order of registration, with views, pooling, functional calls between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.middle = nn.Linear(8, 4)
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.leaky_relu(self.first(x)), 2)
        h = h.permute(0, 2, 3, 1).reshape(len(x), -1)
        h = F.dropout(F.gelu(self.middle(h)), 0.0, self.training)
        return self.last(h.clone().sin_() * 2)


@quiet
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_anything_between_the_layers(feedback: object) -> None:
    model, start = Functional(), Functional()
    twin = Chain(
        [model.first, model.middle, model.last],
        [
            lambda h: F.max_pool2d(F.leaky_relu(h), 2).permute(0, 2, 3, 1).flatten(1),
            lambda h: F.gelu(h).sin() * 2,
            identity,
        ],
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64)
    y, loss, _ = cross_entropy(x, 3)
    reference = MoreauStep(copy.deepcopy(twin), Inner(LR), feedback=feedback is True)
    for _ in range(2):
        reference.step(x, loss, torch.full((4,), 0.25).double(), softmax_lines(y))
    steps(model, x, loss, 2, lr=LR, feedback=feedback, gram="exact")  # type: ignore[arg-type]
    assert_params(twin, reference.params, 1e-9)
    assert_same(model.unused, start.unused)


@quiet
def test_frozen_layer_between() -> None:
    """A frozen layer is part of the dynamics, not a control."""
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double().requires_grad_(False)
    layers = [nn.Linear(3, 4), nn.Linear(4, 3)]
    twin = Chain(layers, [lambda h: frozen(torch.tanh(h)).sin(), identity]).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.last = layers[0], frozen, layers[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.frozen(torch.tanh(self.first(x))).sin())

    x = input_for(twin, 4)
    _, loss, hessian = cross_entropy(x, 3)
    reference = DenseDDP(copy.deepcopy(twin), Inner(LR))
    before = snapshot(frozen)
    for _ in range(2):
        reference.step(x, loss, hessian)
    steps(Net(), x, loss, 2, lr=LR, value=LowRank())  # type: ignore[arg-type]
    assert_params(twin, reference.params)
    assert_unchanged(frozen, before)


@quiet
def test_skip_around_a_frozen_layer() -> None:
    torch.manual_seed(0)
    frozen = nn.Linear(4, 4).double().requires_grad_(False)
    layers = [nn.Linear(3, 4), nn.Linear(4, 3)]

    def skip(h: Tensor) -> Tensor:
        return torch.tanh(h) + frozen(torch.tanh(h))

    twin = Chain(layers, [skip, identity]).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.last = layers[0], frozen, layers[1]

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(h + self.frozen(h))

    x = input_for(twin, 4)
    _, loss, hessian = cross_entropy(x, 3)
    reference = DenseDDP(copy.deepcopy(twin), Inner(LR))
    for _ in range(2):
        reference.step(x, loss, hessian)
    steps(Net(), x, loss, 2, lr=LR, value=LowRank())  # type: ignore[arg-type]
    assert_params(twin, reference.params)


class Branching(nn.Module):
    """Trainable layers that do not run one after another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.left, self.right = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        if self.kind == "residual":
            h = torch.tanh(h + self.right(torch.tanh(self.left(h))))
        elif self.kind == "parallel":
            h = torch.tanh(self.left(h)) * torch.tanh(self.right(h))
        elif self.kind == "long_skip":
            h = h + self.left(h).tanh()
            h = h + self.right(h).tanh()
        else:  # a layer used twice
            h = torch.tanh(self.right(torch.tanh(self.left(torch.tanh(self.left(h))))))
        return self.head(h)


BRANCHES = ("residual", "parallel", "long_skip")


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("kind", [*BRANCHES, "shared"])
def test_branches_are_layer_wise(kind: str, feedback: object) -> None:
    """Every layer has its own policy, a layer that is used twice one; see also tests/graphs."""
    model, twin = Branching(kind), Branching(kind)
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    iterate(model, opt, [0])
    assert opt.last_step is not None and opt.last_step.front is None
    assert [layer.name for layer in opt.last_step.layers] == ["stem", "left", "right", "head"]
    iterate(twin, torch.optim.SGD(twin.parameters(), LR), [0])
    for name in ("stem", "left", "right", "head"):
        assert distance(getattr(model, name), getattr(twin, name)) > 1e-6


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_of_values_on_chains_are_named_once(kind: str) -> None:
    """The dense value function has the state of a chain alone: one weight a sample in front."""
    model = Branching(kind)
    opt = DDPNOpt(model, lr=LR, value="dense")
    with pytest.warns(DDPNOptWarning, match=r"'left'.*one after another"):
        iterate(model, opt, [0])
    assert opt.last_step is not None and opt.last_step.front is not None
    assert opt.last_step.front.name == "the input of 'head'"
    assert [layer.name for layer in opt.last_step.layers] == ["head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterate(model, opt, [1])


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_layer_used_twice_by_values_on_chains(feedback: object) -> None:
    """The plain step for it, said once, and its neighbours uncorrupted."""
    model, twin = Branching("shared"), Branching("shared")
    opt = DDPNOpt(model, lr=LR, feedback=feedback, value="dense")
    with pytest.warns(DDPNOptWarning, match="left"):
        iterate(model, opt, [0])
    iterate(twin, torch.optim.SGD(twin.parameters(), LR), [0])
    assert_same(model.left, twin.left, 1e-14)
    assert distance(model.right, twin.right) > 1e-5


@quiet
@pytest.mark.parametrize("kind", [*BRANCHES, "shared"])
def test_branching_without_feedback_is_plain(kind: str) -> None:
    model, twin = Branching(kind), Branching(kind)
    iterate(model, DDPNOpt(model, lr=LR, feedback=False), range(3))
    iterate(twin, torch.optim.SGD(twin.parameters(), LR), range(3))
    assert_same(model, twin, 1e-15)
