# SPDX-License-Identifier: MIT
"""Second-order dynamics against full automatic differentiation of Q in float64."""

from __future__ import annotations

import copy

import hypothesis
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, DDPNOptWarning, UnsupportedModelError
from ddpnopt.layers import RULES, LayerRule
from ddpnopt.linearise import second_derivative
from ddpnopt.value import Dense
from oracles.common import (
    CONVOLUTIONS,
    assert_params,
    chains,
    conv_chain,
    cross_entropy,
    dense_chain,
    input_for,
    squared,
    steps,
)
from oracles.flat import Chain
from oracles.full_q import FullQ

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
BACKUPS = ("proximal", "closed_loop", "riccati")
LR = 0.3


def compare(model: Chain, kind: str = "riccati", loss: str = "cross_entropy", **options: object):
    x = input_for(model, 4)
    outputs = model(x).shape[1]
    _, function, hessian = (cross_entropy if loss == "cross_entropy" else squared)(x, outputs)
    reference = FullQ(copy.deepcopy(model), LR, second=True, kind=kind, **options)  # type: ignore
    for _ in range(2):
        reference.step(x, function, hessian)
    value = Dense(backup=kind, dynamics="second_order", **options)  # type: ignore[arg-type]
    steps(model, x, function, 2, lr=LR, value=value, terminal=loss)
    assert_params(model, reference.params)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softplus", "relu"])
@pytest.mark.parametrize("kind", BACKUPS)
def test_dense_nets(activation: str, kind: str) -> None:
    compare(dense_chain([3, 5, 4, 3], activation), kind)


@pytest.mark.parametrize("kind", BACKUPS)
def test_convolutions(kind: str) -> None:
    compare(conv_chain([CONVOLUTIONS[1], {"kernel_size": 2}], 3, "softplus"), kind)


@pytest.mark.parametrize("kind", BACKUPS)
def test_own_layer_and_regularization(kind: str) -> None:
    compare(dense_chain([3, 4, 3]), kind, own_layer=True, regularization=0.1)


@pytest.mark.parametrize("kind", BACKUPS)
def test_squared_error_and_a_norm(kind: str) -> None:
    """LayerNorm has second derivatives of its own, g_xx and g_ux."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)]
    after = [torch.tanh, torch.tanh, torch.sigmoid, lambda h: h]
    compare(Chain(layers, after).double(), kind, loss="mse")


class Seen(LayerRule):
    """Leaves `Affine` without a rule."""

    parameters = ("matrix",)

    def refusal(self, module: nn.Module) -> str:
        return "it is left out"


class Affine(nn.Module):
    """Keeps the weights that it has run with."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4).double())
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.matrix.detach().clone())
        return x @ self.matrix


def test_segments_are_those_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer outside the feedback steps first, but not before the segments are taken."""
    monkeypatch.setitem(RULES, Affine, Seen())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Affine(), nn.Tanh(), nn.Linear(4, 3)).double()
    nominal = model[2].matrix.detach().clone()
    opt = DDPNOpt(model, lr=LR, value=Dense(dynamics="second_order"))
    F.cross_entropy(model(torch.randn(5, 3).double()), torch.tensor([0, 1, 2, 0, 1])).backward()
    with pytest.warns(DDPNOptWarning, match="'2' take the borrowed"):
        opt.step()
    seen = model[2].seen
    assert len(seen) == 3 and torch.equal(seen[1], nominal)  # the pass, the cut, the rollout
    assert torch.equal(seen[2], model[2].matrix) and not torch.equal(seen[2], nominal)


@hypothesis.given(chains(min_depth=2))
@hypothesis.settings(max_examples=6)
def test_random_chains(case: object) -> None:
    model, _, _ = case  # type: ignore[misc]
    if isinstance(model.layers[0], nn.Linear):
        compare(model)


def test_it_differs_from_first_order() -> None:
    x = input_for(dense_chain([3, 5, 4, 3]), 4)
    _, loss, _ = cross_entropy(x, 3)
    found = []
    for dynamics in ("first_order", "second_order"):
        model = dense_chain([3, 5, 4, 3])
        steps(model, x, loss, 1, lr=LR, value=Dense(backup="riccati", dynamics=dynamics))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert 1e-6 < float((found[0] - found[1]).norm()) < 1.0


def test_piecewise_linear_activations_have_none() -> None:
    h = torch.randn(4, 5).double().requires_grad_()
    for function in (torch.relu, lambda h: h * 2):
        V = torch.randn(4, 5).double()
        assert not second_derivative(h, function(h), V, 4).any()


def test_accumulated_passes_are_one_batch() -> None:
    model, twin = dense_chain([3, 5, 4, 3]), dense_chain([3, 5, 4, 3])
    x = input_for(model, 6)
    y, _, _ = cross_entropy(x, 3)
    value = Dense(dynamics="second_order")
    for m, parts in ((model, [slice(0, 6)]), (twin, [slice(0, 3), slice(3, 6)])):
        opt = DDPNOpt(m, lr=LR, value=value)
        for part in parts:
            (F.cross_entropy(m(x[part]), y[part]) / len(parts)).backward()
        opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_without_weight_gradients(weight_gradients: bool) -> None:
    model, twin = dense_chain([3, 5, 4, 3]), dense_chain([3, 5, 4, 3])
    x = input_for(model, 4)
    _, loss, _ = cross_entropy(x, 3)
    value = Dense(dynamics="second_order")
    steps(model, x, loss, 1, lr=LR, value=value, weight_gradients=weight_gradients)
    steps(twin, x, loss, 1, lr=LR, value=value)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_in_place_activations() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    model = nn.Sequential(first, nn.ReLU(inplace=True), last)
    twin = copy.deepcopy(nn.Sequential(first, nn.ReLU(), last))
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 0, 1])
    for m in (model, twin):
        opt = DDPNOpt(m, lr=LR, value=Dense(dynamics="second_order"))
        F.cross_entropy(m(x), y).backward()
        opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_refused_behind_a_mixing_of_samples() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    opt = DDPNOpt(model, value=Dense(dynamics="second_order"))
    before = copy.deepcopy(model[0].weight)
    F.cross_entropy(model(torch.randn(5, 3)), torch.tensor([0, 1, 2, 0, 1])).backward()
    with pytest.raises(UnsupportedModelError, match="second-order"):
        opt.step()
    assert torch.equal(before, model[0].weight)


def test_open_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="second forward pass"):
        DDPNOpt(nn.Linear(3, 2), value=Dense(dynamics="second_order"), feedback="open_loop")


def test_unknown_dynamics() -> None:
    with pytest.raises(ValueError, match="dynamics='third'"):
        Dense(dynamics="third")
