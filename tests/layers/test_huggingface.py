# SPDX-License-Identifier: MIT
"""Hugging Face's Conv1D: against autograd, and a net of it against the same net of nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.layers import registered, rule_for
from ddpnopt.positions import Gain, Product
from ddpnopt.testing import check_layer

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def twins(inputs: int = 4, outputs: int = 3) -> tuple[nn.Module, nn.Linear]:
    """The same function, with weights of either layout."""
    conv, linear = Conv1D(outputs, inputs), nn.Linear(inputs, outputs)
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    return conv.double(), linear.double()


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 2, 3, 4)])
def test_rule_equals_autograd(shape: tuple[int, ...], samples: int | None) -> None:
    check_layer(Conv1D(3, 4), torch.randn(shape), samples=samples)


def test_it_is_found_by_name() -> None:
    found = registered(Conv1D(3, 4))
    assert type(found).__name__ == "Conv1DRule" and found.holds_weight


def test_a_subclass_counts_if_its_function_is_the_same() -> None:
    class Named(Conv1D):  # type: ignore[misc, valid-type]
        label = "attention"

    class Scaled(Conv1D):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert registered(Named(3, 4)) is registered(Conv1D(3, 4))
    assert registered(Scaled(3, 4)) is None


def kronecker() -> Product:
    A, G = torch.rand(1, 5, 5).double(), torch.rand(1, 3, 3).double()
    return Product(A @ A.mT, G @ G.mT, 0.4, True)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
@pytest.mark.parametrize("kind", ["number", "diagonal", "kronecker"])
def test_products_equal_those_of_a_dense_layer(kind: str, shape: tuple[int, ...]) -> None:
    conv, linear = twins()
    x = torch.randn(shape).double()
    V = torch.randn(2, *shape[:-1], 3).double()
    ours, theirs = rule_for(conv), rule_for(linear)
    assert ours is not None and theirs is not None
    gain: dict[str, Gain] = {"weight": 0.3, "bias": 0.7}
    mine = gain
    if kind == "diagonal":
        P = torch.rand(3, 4).double()
        gain, mine = {"weight": P, "bias": 0.7}, {"weight": P.T.contiguous(), "bias": 0.7}
    elif kind == "kronecker":
        gain = mine = {"weight": kronecker()}
    for samples in (6, 3):
        for a, b in (
            (ours.gram(conv, x, V, mine, samples), theirs.gram(linear, x, V, gain, samples)),
            (
                ours.curvature(conv, x, V[0], mine, samples),
                theirs.curvature(linear, x, V[0], gain, samples),
            ),
        ):
            torch.testing.assert_close(a, b)
    start = {n: torch.zeros_like(p) for n, p in conv.named_parameters()}
    found = ours.onto(conv, x, V[0], start, -0.5)
    for name, one in theirs.gradient(linear, x, V[0]).items():
        expected = -0.5 * (one.T if name == "weight" else one)
        torch.testing.assert_close(found[name], expected)
    change = {"weight": torch.randn(3, 4).double(), "bias": torch.randn(3).double()}
    moved = {**change, "weight": change["weight"].T}
    torch.testing.assert_close(
        ours.along(conv, x, V, moved, 3), theirs.along(linear, x, V, change, 3)
    )
    dx = torch.randn_like(x)
    mixed, of_linear = ours.mixed(conv, x, dx, V[0]), theirs.mixed(linear, x, dx, V[0])
    torch.testing.assert_close(mixed["weight"], of_linear["weight"].T)
    assert not mixed["bias"].any() and ours.state_curvature(conv, x, V[0], 6) is None


class Net(nn.Module):
    """Dense layers of one kind or the other, applied along a sequence."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.head = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(h.mean(1))


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.parametrize(
    ("curvature", "value"),
    [
        *[(curvature, "moreau") for curvature in ("identity", "rmsprop", "kfac", "ekfac")],
        *[("identity", value) for value in ("gauss_newton", "low_rank", "dense")],
        ("rmsprop", "dense"),
        ("kfac", "low_rank"),
    ],
)
def test_a_net_takes_the_steps_of_its_dense_twin(
    curvature: str, value: str, feedback: object
) -> None:
    torch.manual_seed(0)
    (a, b), (c, d) = twins(4, 6), twins(6, 5)
    ours, theirs = Net(a, c), Net(b, d)
    theirs.head = copy.deepcopy(ours.head)
    first = DDPNOpt(ours, lr=0.1, curvature=curvature, value=value, feedback=feedback)
    second = DDPNOpt(theirs, lr=0.1, curvature=curvature, value=value, feedback=feedback)
    for _ in range(3):
        x, y = torch.randn(8, 5, 4).double(), torch.randint(3, (8,))
        for net, opt in ((ours, first), (theirs, second)):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        other = q.T if p.shape != q.shape else q
        torch.testing.assert_close(p, other, rtol=1e-9, atol=1e-11)


def test_without_weight_gradients() -> None:
    torch.manual_seed(0)
    (a, b), (c, d) = twins(4, 6), twins(6, 5)
    ours, theirs = Net(a, c), Net(b, d)
    theirs.head = copy.deepcopy(ours.head)
    x, y = torch.randn(8, 5, 4).double(), torch.randint(3, (8,))
    for net in (ours, theirs):
        opt = DDPNOpt(net, lr=0.1, weight_gradients=False)
        F.cross_entropy(net(x), y).backward()
        assert net.first.weight.grad is None
        opt.step()
    torch.testing.assert_close(ours.first.weight, theirs.first.weight.T)
    torch.testing.assert_close(ours.second.weight, theirs.second.weight.T)
