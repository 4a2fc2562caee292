# SPDX-License-Identifier: MIT
"""The Moreau envelope against a scalar dynamic programme; whole steps written sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ddpnopt.curvature import CURVATURES, Curvature, Trust
from ddpnopt.value import Moreau
from oracles.adaptor import library_coefficient
from oracles.common import (
    CONVOLUTIONS,
    Loss,
    assert_params,
    conv_chain,
    cross_entropy,
    dense_chain,
    input_for,
    squared,
    steps,
)
from oracles.flat import Chain, Inner
from oracles.moreau_scalar import (
    LineModel,
    implicit_coefficient,
    joint_policy,
    line_models,
    logistic_line,
    nested_policy,
    quadratic_line,
    softmax_line,
)
from oracles.moreau_step import MoreauStep
from oracles.trust import Trusted

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

Lines = Callable[[Tensor], list[LineModel]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    line_models(),
    st.lists(st.floats(0.01, 30.0), min_size=1, max_size=2),
    st.floats(-5.0, 5.0),
)
def test_policy_is_the_nested_programme(line: LineModel, s: list[float], q: float) -> None:
    assert library_coefficient(line, sum(s), q) == pytest.approx(
        nested_policy(line, s, q), rel=1e-6, abs=1e-6
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    line_models(),
    st.lists(st.floats(0.01, 30.0), min_size=3, max_size=6),
    st.floats(-5.0, 5.0),
)
def test_policy_of_many_layers(line: LineModel, s: list[float], q: float) -> None:
    assert library_coefficient(line, sum(s), q) == pytest.approx(
        joint_policy(line, s, q), rel=1e-5, abs=1e-6
    )


def test_nested_programme_of_three_layers() -> None:
    line = softmax_line(np.array([1.0, 2.0, -1.0, 0.3]), np.eye(4)[2])
    expected = nested_policy(line, [0.4, 2.0, 1.0], -0.7)
    assert library_coefficient(line, 3.4, -0.7) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(line_models(), st.floats(0.0, 1e6), st.floats(-100.0, 100.0))
def test_policy_solves_its_equation_at_any_size(line: LineModel, s: float, q: float) -> None:
    expected = implicit_coefficient(line, s, q)
    assert library_coefficient(line, s, q) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("s", [0.0, 1e-12, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("q", [-1e3, -1.0, 0.0, 1.0, 1e3])
@pytest.mark.parametrize("margin", [-40.0, -10.0, 0.0, 10.0, 30.0])
def test_saturated_samples(s: float, q: float, margin: float) -> None:
    """Confidently wrong (margin < 0) and right samples: where few Newton steps are not enough."""
    logits = np.zeros(5)
    logits[1] = margin
    line = softmax_line(logits, np.eye(5)[1])
    got = library_coefficient(line, s, q)
    assert line.excess is not None
    s = min(s, 1e12 / (line.omega * (1 + line.excess)))  # the documented bound on the stiffness
    assert np.isfinite(got) and got >= 0
    assert got == pytest.approx(implicit_coefficient(line, s, q), rel=1e-6, abs=1e-9)


def test_nothing_ahead_is_the_plain_step() -> None:
    line = softmax_line(np.array([0.3, -1.0, 2.0]), np.eye(3)[0])
    assert library_coefficient(line, 0.0, 0.0) == pytest.approx(1.0, abs=1e-14)


def case(kind: str, loss: str, batch: int = 4) -> tuple[Chain, Tensor, Loss, Tensor, Lines, str]:
    """Model, inputs, loss, sample weights, line models and the terminal's name."""
    model = dense_chain([4, 5, 4, 3])
    if kind == "conv":
        model = conv_chain([CONVOLUTIONS[1], {"kernel_size": 2}], 3, "softplus")
    x = input_for(model, batch)
    w = torch.full((batch,), 1 / batch, dtype=torch.float64)
    if loss == "mse":
        y, function, _ = squared(x, 3)

        def mse_lines(z: Tensor) -> list[LineModel]:
            factor = (2 / 3) ** 0.5 * np.eye(3)
            return [quadratic_line(factor, g) for g in (2 / 3 * (z - y)).numpy()]

        return model, x, function, w, mse_lines, "mse"
    if loss == "bce":
        targets = (torch.randn(batch, 3, generator=torch.Generator().manual_seed(5)) > 0).double()

        def bce(z: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(z, targets)

        def bce_lines(z: Tensor) -> list[LineModel]:
            pairs = zip(z.numpy(), targets.numpy(), strict=True)
            return [logistic_line(a, b) for a, b in pairs]

        return model, x, bce, w / 3, bce_lines, "bce_with_logits"
    y, function, _ = cross_entropy(x, 3)
    if loss == "weighted":
        classes = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        w = classes[y] / classes[y].sum()

        def function(z: Tensor) -> Tensor:
            return F.cross_entropy(z, y, classes)

    target = F.one_hot(y, 3).double().numpy()
    if loss == "sum":
        w = torch.ones_like(w)

        def function(z: Tensor) -> Tensor:
            return F.cross_entropy(z, y, reduction="sum")

    if loss == "ignored":
        y = y.clone()
        y[1] = -100
        w = (y >= 0).double() / (batch - 1)
        target[1] = 1 / 3  # any: its gradient is zero

        def function(z: Tensor) -> Tensor:
            return F.cross_entropy(z, y)

    if loss == "smoothing":
        target = 0.9 * target + 0.1 / 3

        def function(z: Tensor) -> Tensor:
            return F.cross_entropy(z, y, label_smoothing=0.1)

    def softmax_lines(z: Tensor) -> list[LineModel]:
        return [softmax_line(a, b) for a, b in zip(z.numpy(), target, strict=True)]

    return model, x, function, w, softmax_lines, "cross_entropy"


def compare(kind: str, loss: str, name: str, feedback: object = True, **options: object) -> None:
    model, x, function, w, line_models, terminal = case(kind, loss)
    momentum = options.pop("momentum", 0.0)
    decay = options.pop("weight_decay", 0.0)
    weight_gradients = options.pop("weight_gradients", True)
    options.setdefault("strength", 1.0)
    lr = {"identity": 0.8, "rmsprop": 0.05}.get(name, 30.0)
    if loss == "sum" and name == "identity":
        lr /= len(x)
    twin = copy.deepcopy(model)
    inner = Inner(lr, momentum, name)
    curvature: str | Curvature = name
    if name not in CURVATURES:  # "trust around ..."
        name, tau = name.removeprefix("trust around "), options.pop("tau", None)
        curvature = Trust(name, tau)
        inner = Trusted(lambda: reference.params, twin.layers, tau, lr, momentum, name)
    reference = MoreauStep(
        twin,
        inner,
        weight_decay=decay,
        feedback=feedback is True,
        **options,
    )
    for _ in range(3):
        seen = reference.step(x, function, w, line_models)
    assert min(min(row) for row in seen) < 0.98  # the rule does something here
    steps(
        model,
        x,
        function,
        3,
        lr=lr,
        curvature=curvature,
        value=Moreau(**options),
        terminal=terminal,
        momentum=momentum,
        weight_decay=decay,
        feedback=feedback,
        gram="exact",
        weight_gradients=weight_gradients,
    )
    assert_params(model, reference.params, 1e-9)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize(
    "loss", ["cross_entropy", "weighted", "sum", "ignored", "smoothing", "bce", "mse"]
)
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
def test_step(kind: str, loss: str, name: str) -> None:
    compare(kind, loss, name)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("own_layer", [False, True])
@pytest.mark.parametrize("coupling", [False, True])
def test_options(kind: str, name: str, own_layer: bool, coupling: bool) -> None:
    compare(kind, "cross_entropy", name, own_layer=own_layer, coupling=coupling)


@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("strength", [0.25, 2.0])
def test_strength(name: str, strength: float) -> None:
    compare("dense", "cross_entropy", name, strength=strength)


@pytest.mark.parametrize("name", ["identity", "rmsprop"])
def test_momentum_and_decay(name: str) -> None:
    compare("dense", "cross_entropy", name, momentum=0.6, weight_decay=0.02)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("coupling", [False, True])
def test_open_loop_is_q_zero(kind: str, name: str, coupling: bool) -> None:
    compare(kind, "cross_entropy", name, feedback="open_loop", coupling=coupling)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_without_weight_gradients(kind: str, feedback: object) -> None:
    compare(kind, "cross_entropy", "identity", feedback, coupling=False, weight_gradients=False)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_default_follows_the_flow(kind: str, name: str, feedback: object, loss: str) -> None:
    compare(kind, loss, name, feedback, strength=None)


@pytest.mark.parametrize("options", [{"own_layer": False}, {"coupling": False}, {"momentum": 0.6}])
def test_options_of_the_default(options: dict[str, object]) -> None:
    compare("dense", "cross_entropy", "identity", strength=None, **options)


@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_default_of_an_unbounded_slope_is_the_envelope(name: str, feedback: object) -> None:
    compare("dense", "mse", name, feedback, strength=None)


def test_default_differs_from_every_constant() -> None:
    """Between the envelopes at half and full strength, and equal to neither."""
    nets = {}
    for strength in (None, 0.5, 1.0):
        model, x, function, *_ = case("dense", "cross_entropy")
        steps(model, x, function, 1, lr=3.0, value=Moreau(strength=strength))
        nets[strength] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float((nets[None] - nets[0.5]).abs().max()) > 1e-3
    assert float((nets[None] - nets[1.0]).abs().max()) > 1e-3


TRUSTED = ("trust around identity", "trust around rmsprop")


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("loss", ["cross_entropy", "weighted", "bce", "mse"])
@pytest.mark.parametrize("name", TRUSTED)
def test_step_bounded_by_the_weights(kind: str, loss: str, name: str) -> None:
    compare(kind, loss, name, strength=None)


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.1}, {"coupling": False}, {"own_layer": False}, {"momentum": 0.6}]
    + [{"weight_decay": 0.02}, {"feedback": "open_loop"}],
)
@pytest.mark.parametrize("name", TRUSTED)
def test_options_of_the_bound(name: str, options: dict[str, object]) -> None:
    compare("dense", "cross_entropy", name, strength=None, **options)
