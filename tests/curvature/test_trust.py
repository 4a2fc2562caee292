# SPDX-License-Identifier: MIT
"""Steps bounded by the weights against plain loops of torch's optimizers, and the bound itself.

Whole steps with feedback against an oracle: tests/test_moreau_oracle.py.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import AdamW, RMSprop, Trust
from ddpnopt.hyperparameters import curvature_options, hyperparameters
from ddpnopt.value import Moreau
from oracles.common import assert_same, snapshot
from oracles.kronecker import data, net, train

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
MATRICES = sum(p.dim() > 1 for p in net().parameters())


def lengths(t: Tensor) -> Tensor:
    """Of every unit, one by one."""
    return torch.stack([u.norm() for u in t]) if t.dim() > 1 else t.norm()[None]


def factors(p: Tensor, step: Tensor, tau: float) -> Tensor:
    longest = tau * lengths(p.detach()).clamp(min=1e-3)
    found = (lengths(step) / longest).clamp(min=1.0)
    return found.reshape(-1, *[1] * (p.dim() - 1))


@pytest.mark.parametrize("lr", [0.01, 3.0, 1e6])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("tau", [None, 0.05])
def test_without_feedback_it_is_clipped_descent(
    lr: float, momentum: float, tau: float | None
) -> None:
    model, twin = net(), net()
    opt = DDPNOpt(model, lr=lr, curvature=Trust(tau=tau), momentum=momentum, feedback=False)
    other = torch.optim.SGD(twin.parameters(), lr, momentum)
    bound = math.log(2) / MATRICES if tau is None else tau
    for x, y in data(12):
        train(model, opt, [(x, y)])
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for p in twin.parameters():
            assert p.grad is not None
            p.grad /= factors(p, lr / (1 - momentum) * p.grad, bound)
        other.step()
    assert_same(model, twin, 1e-10)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [0.003, 10.0])
def test_without_feedback_it_is_bounded_adamw(lr: float, weight_decay: float) -> None:
    model, twin = net(), net()
    options = {"weight_decay": weight_decay, "feedback": False}
    opt = DDPNOpt(model, lr=lr, curvature=Trust(AdamW((0.8, 0.95)), 0.1), **options)
    assert opt.param_groups[0]["curvature"]["inner"]["betas"] == (0.8, 0.95)
    m = {p: torch.zeros_like(p) for p in twin.parameters()}
    v = {p: torch.zeros_like(p) for p in twin.parameters()}
    for k, (x, y) in enumerate(data(12), start=1):
        train(model, opt, [(x, y)])
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for p in twin.parameters():
                assert p.grad is not None
                v[p] = 0.95 * v[p] + 0.05 * p.grad**2
                M = (v[p] / (1 - 0.95**k)).sqrt() + 1e-8
                factor = factors(p, lr * p.grad / M, 0.1)
                m[p] = 0.8 * m[p] + 0.2 * p.grad / factor
                p.mul_(1 - lr * weight_decay)
                p -= lr * m[p] / (1 - 0.8**k) / M
    assert_same(model, twin, 1e-9)


@pytest.mark.parametrize("inner", ["identity", "rmsprop", RMSprop(second_moment="per_sample")])
@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("lr", [1.0, 1e3, 1e8])
def test_no_rate_makes_a_step_too_long(inner: Any, feedback: Any, lr: float) -> None:
    model = net()
    opt = DDPNOpt(model, lr=lr, curvature=Trust(inner), feedback=feedback)
    longest = math.log(2) / MATRICES
    for x, y in data(4):
        before = snapshot(model)
        train(model, opt, [(x, y)])
        for name, p in model.named_parameters():
            bound = longest * lengths(before[name]).clamp(min=1e-3)
            assert (lengths(p.detach() - before[name]) <= bound * (1 + 1e-9)).all()
    if lr == 1e8 and feedback is False:
        moved = lengths(p.detach() - before[name])
        torch.testing.assert_close(moved, bound)


@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("inner", ["identity", "rmsprop", "adamw"])
def test_short_steps_are_the_inner_curvatures(inner: str, feedback: Any) -> None:
    model, twin = net(), net()
    bounded = DDPNOpt(model, lr=1e-3, curvature=Trust(inner, 1e3), feedback=feedback)
    for m, opt in ((model, bounded), (twin, DDPNOpt(twin, 1e-3, inner, feedback=feedback))):
        train(m, opt, data(8))
    assert_same(model, twin, 0.0 if feedback is False else 1e-12)


@pytest.mark.parametrize("inner", ["identity", "adamw"])
def test_coefficients_of_one_are_the_step_without_feedback(inner: str) -> None:
    model, twin = net(), net()
    value = Moreau(strength=0.0)
    opt = DDPNOpt(model, 0.3, Trust(inner), value=value, feedback="open_loop")
    train(model, opt, data(8))
    train(twin, DDPNOpt(twin, 0.3, Trust(inner), feedback=False), data(8))
    assert_same(model, twin, 1e-12)


def test_one_layer_has_no_closed_loop() -> None:
    model = nn.Sequential(nn.Linear(5, 4)).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    x, y = torch.randn(6, 5).double(), torch.randint(4, (6,))
    for m, feedback in ((model, True), (twin, "open_loop")):
        train(m, DDPNOpt(m, 3.0, "trust", feedback=feedback), [(x, y)] * 3)
    assert_same(model, twin, 1e-12)


def test_frozen_weights_do_not_count() -> None:
    """tau = log(2) / L with the L weights that are trained."""
    model = net()
    opt = DDPNOpt(model, 1e8, "trust", feedback=False)
    next(iter(model.parameters())).requires_grad_(False)
    before = snapshot(model)
    train(model, opt, data(1))
    name, p = next((n, p) for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1)
    ratio = lengths(p.detach() - before[name]) / lengths(before[name])
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.log(2) / (MATRICES - 1)))


@pytest.mark.parametrize("inner", ["adamw", AdamW((0.7, 0.9), 1e-6), {"name": "rmsprop"}])
def test_options_are_plain_values_and_come_back(inner: Any) -> None:
    model, twin = net(), net()
    opt = DDPNOpt(model, 0.1, Trust(inner, 0.03))
    other = DDPNOpt(twin, 0.7, "trust")
    train(model, opt, data(3))
    saved = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    kinds = [next(iter(hyperparameters(o.param_groups).values())).curvature for o in (opt, other)]
    assert kinds[0] is kinds[1]
    for m, o in ((model, opt), (twin, other)):
        train(m, o, data(5))
    assert_same(model, twin)


def test_wrong_options_are_named() -> None:
    for options, message in (
        ({"inner": "kfac"}, "inner='kfac'.*identity, rmsprop, adamw"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"shortest": 0.0}, "shortest=0.0"),
        ({"inner": {"name": "adamw", "eps": -1.0}}, "eps=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Trust(**options)
    with pytest.raises(ValueError, match="momentum=0.9"):
        DDPNOpt(net(), curvature=Trust("adamw"), momentum=0.9)
    assert curvature_options("trust") == curvature_options(Trust())
