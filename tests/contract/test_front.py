# SPDX-License-Identifier: MIT
"""Samples weighted once in front of BatchNorm: the update is a re-weighted loss's exact gradient.

The references are plain autograd and torch.optim on copies of the model.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import KFAC
from ddpnopt.value import Moreau
from oracles.common import assert_same
from oracles.fronts import (
    BATCH,
    DEPTHS,
    LR,
    NETS,
    batch,
    coefficients,
    front_of,
    mlp_bn,
    take,
    weighted_gradients,
)

QUIET = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")

BORROWED: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": ({}, torch.optim.SGD, {}),
    "momentum": ({"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
    "decay": ({"weight_decay": 0.1}, torch.optim.SGD, {"weight_decay": 0.1}),
    "both": (
        {"momentum": 0.8, "weight_decay": 0.1},
        torch.optim.SGD,
        {"momentum": 0.8, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("borrowed", BORROWED)
@pytest.mark.parametrize("feedback", DEPTHS)
@pytest.mark.parametrize("value", ["moreau", "gauss_newton"])
@QUIET
def test_front_takes_the_exact_gradient_of_the_weighted_loss(
    net: str, borrowed: str, feedback: Any, value: str
) -> None:
    """One coefficient a sample turns the loss into another; the front steps on its gradient."""
    build, end = NETS[net]
    options, kind, plain_options = BORROWED[borrowed]
    model, twin = build(), build()
    opt = DDPNOpt(model, lr=LR, feedback=feedback, value=value, **options)
    plain = kind(front_of(twin, end), lr=LR, **plain_options)  # type: ignore[call-arg]
    for seed in range(3):
        take(model, opt, seed)
        twin.zero_grad()
        weighted_gradients(twin, coefficients(opt), seed)
        plain.step()
        for p, q in zip(front_of(model, end), front_of(twin, end), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
        twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_samples_are_bounded_and_differ(net: str, feedback: Any) -> None:
    """Otherwise the equality above would say nothing."""
    model = NETS[net][0]()
    opt = DDPNOpt(model, lr=LR, feedback=feedback)
    take(model, opt)
    c = coefficients(opt)
    assert c.shape == (BATCH,) and bool((c > 0).all()) and float(c.min()) < 0.97
    assert float(c.max() - c.min()) > 1e-3


def boundary_gradients(model: nn.Sequential, end: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """(B, ...) g at the boundary state, and the front's plain gradients."""
    x, y = batch(seed)
    state = model[:end](x)
    parameters = front_of(model, end)
    found = torch.autograd.grad(F.cross_entropy(model[end:](state), y), [state, *parameters])
    return found[0].flatten(1), list(found[1:])


@pytest.mark.parametrize("net", ["mlp", "cnn", "last"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@QUIET
def test_first_gain_is_the_plain_gradients(net: str, momentum: float) -> None:
    """S_i - S_above = K |g_i|^2 / w with K = life |gbar|^2 / sum |g|^2 and w = 1/B."""
    build, end = NETS[net]
    model, twin = build(), build()
    opt = DDPNOpt(model, lr=LR, momentum=momentum)
    take(model, opt)
    g, plain = boundary_gradients(twin, end, 0)
    squares = g.square().sum(1)
    K = LR / (1 - momentum) * sum(float(p.square().sum()) for p in plain) / float(squares.sum())
    assert opt.last_step is not None and opt.last_step.front is not None
    # S grows on the way back: the first layer behind the boundary has the largest.
    above = opt.last_step.layers[0].S if opt.last_step.layers else torch.zeros(BATCH)
    S = opt.last_step.front.S
    assert S is not None and above is not None
    torch.testing.assert_close(S, above + K * BATCH * squares, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("feedback", DEPTHS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@QUIET
def test_gain_is_the_running_average_of_what_was_seen(
    net: str, feedback: Any, momentum: float
) -> None:
    """K / life = |d|^2 / sum |c g|^2 for SGD, averaged with decay 0.9; the next S uses it."""
    build, end = NETS[net]
    model, twin = build(), build()
    opt = DDPNOpt(model, lr=LR, momentum=momentum, feedback=feedback)
    expected = None
    for seed in range(4):
        twin.load_state_dict(model.state_dict())
        g, _ = boundary_gradients(twin, end, seed)
        twin.load_state_dict(model.state_dict())
        take(model, opt, seed)
        squares = g.square().sum(1)
        assert opt.last_step is not None and opt.last_step.front is not None
        if expected is not None:
            K = expected * LR / (1 - momentum)
            layers = opt.last_step.layers
            above = layers[0].S if layers else torch.zeros(BATCH)
            assert above is not None and opt.last_step.front.S is not None
            torch.testing.assert_close(
                opt.last_step.front.S, above + K * BATCH * squares, rtol=1e-9, atol=1e-12
            )
        c = coefficients(opt)
        twin.zero_grad()
        weighted_gradients(twin, c, seed)
        d = sum(float(p.grad.square().sum()) for p in front_of(twin, end) if p.grad is not None)
        now = d / float((c.square() * squares).sum())
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert opt.engine.running["*"] == pytest.approx(expected, rel=1e-9)


@QUIET
def test_gain_follows_a_schedule_at_once() -> None:
    """K is kept per unit of the learning rate: a rate cut by 10 cuts the front's S by 10."""
    grown = []
    for factor in (1.0, 0.1):
        model = mlp_bn()
        opt = DDPNOpt(model, lr=LR)
        take(model, opt)
        opt.param_groups[0]["lr"] = LR * factor
        take(model, opt, 1)
        assert opt.last_step is not None and opt.last_step.front is not None
        S, above = opt.last_step.front.S, opt.last_step.layers[0].S
        assert S is not None and above is not None
        grown.append(S - above)
    torch.testing.assert_close(grown[1], 0.1 * grown[0], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("curvature", ["identity", "rmsprop", "adamw"])
@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_low_rank_equals_dense(curvature: str, feedback: Any) -> None:
    """The same quadratic value function in two forms, in front of the mixing, too."""
    nets = []
    for value in ("low_rank", "dense"):
        model = mlp_bn()
        opt = DDPNOpt(model, lr=0.02, curvature=curvature, value=value, feedback=feedback)
        for seed in range(3):
            take(model, opt, seed)
        nets.append(model)
    assert_same(*nets, tolerance=1e-8)


CURVATURES = ["identity", "rmsprop", "adamw", "kfac", "ekfac"]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_every_curvature_has_a_front_and_resumes_to_the_bit(curvature: str, feedback: Any) -> None:
    model = mlp_bn()
    opt = DDPNOpt(model, lr=0.02, curvature=curvature, feedback=feedback)
    for seed in range(3):
        take(model, opt, seed)
    assert opt.engine.running["*"] > 0
    other = mlp_bn()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    second = DDPNOpt(other, lr=0.02, curvature=curvature, feedback=feedback)
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(3, 6):
        take(model, opt, seed)
        take(other, second, seed)
    assert_same(model, other)
    assert opt.engine.running == second.engine.running


@pytest.mark.parametrize("curvature", ["rmsprop", "adamw"])
@QUIET
def test_scale_free_front_is_not_the_plain_step(curvature: str) -> None:
    """M is fed with the plain gradient; the re-weighting is not divided out again."""
    model, twin = mlp_bn(), mlp_bn()
    opt = DDPNOpt(model, lr=0.05, curvature=curvature)
    off = DDPNOpt(twin, lr=0.05, curvature=curvature, feedback=False)
    for seed in range(2):
        take(model, opt, seed)
        take(twin, off, seed)
    assert float((model[0].weight - twin[0].weight).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("feedback", DEPTHS)
@QUIET
def test_kronecker_step_of_the_front(feedback: Any) -> None:
    """M from the plain gradients, d from the weighted ones: u <- u - eta M^-1 d, by hand."""
    model, twin = mlp_bn(), mlp_bn()
    damping, rate = 0.1, 0.05
    opt = DDPNOpt(model, lr=rate, curvature=KFAC(damping=damping), feedback=feedback)
    take(model, opt)
    x, y = batch()
    h = twin[0](x)
    (g,) = torch.autograd.grad(F.cross_entropy(twin[1:](h), y), h)
    u = torch.cat([x, x.new_ones(BATCH, 1)], 1)
    A, G = u.mT @ u / BATCH, BATCH * g.mT @ g
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    A = A + pi * damping**0.5 * torch.eye(len(A), dtype=A.dtype)
    G = G + damping**0.5 / pi * torch.eye(len(G), dtype=G.dtype)
    before = torch.cat([twin[0].weight, twin[0].bias[:, None]], 1).detach()
    twin = mlp_bn()
    weighted_gradients(twin, coefficients(opt), 0)
    assert twin[0].weight.grad is not None and twin[0].bias.grad is not None
    D = torch.cat([twin[0].weight.grad, twin[0].bias.grad[:, None]], 1)
    want = before - rate * torch.linalg.solve(G, torch.linalg.solve(A, D, left=False))
    after = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    torch.testing.assert_close(after, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("curvature", ["rmsprop", "adamw"])
def test_the_curvatures_own_strength(curvature: str) -> None:
    """S in front of BatchNorm is halved for AdamW, as it is for a layer."""
    S = []
    for value in (Moreau(), Moreau(strength=1.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        x, y = torch.randn(8, 4), torch.arange(8) % 3
        opt = DDPNOpt(model, lr=0.01, curvature=curvature, value=value, feedback="open_loop")
        F.cross_entropy(model(x), y).backward()
        opt.step()
        assert opt.last_step is not None and opt.last_step.front is not None
        S.append(opt.last_step.front.S)
    # The front's S begins with that of the layer behind it, which has the factor, too.
    torch.testing.assert_close(S[0], S[1] * (0.5 if curvature == "adamw" else 1.0))
