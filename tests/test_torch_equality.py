# SPDX-License-Identifier: MIT
"""Switched off, the optimizer is the borrowed one to the last rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

from ddpnopt import PAPER, DDPNOpt
from ddpnopt.curvature import Identity, RMSprop
from ddpnopt.value import GaussNewton
from oracles.common import CONVOLUTIONS, conv_chain, dense_chain, input_for

STEPS = 50
Optimizer = torch.optim.Optimizer


def batches(model: nn.Module, classes: int, count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(count):
        x = input_for(model, 6, seed)
        generator = torch.Generator().manual_seed(seed)
        yield x, torch.randint(0, classes, (6,), generator=generator)


def fit(
    model: nn.Module,
    opt: Optimizer,
    clip: float | None = None,
    scheduler: LRScheduler | None = None,
    count: int = STEPS,
) -> nn.Module:
    for x, y in batches(model, 3, count):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        if scheduler is not None:
            scheduler.step()
    return model


def assert_last_rounding(first: nn.Module, second: nn.Module, ulps: int = 1) -> None:
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    for (name, a), b in pairs:
        size = torch.maximum(a.abs(), b.abs())
        one = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
        assert bool(((a - b).abs() <= ulps * one).all()), name


def net(kind: str) -> nn.Module:
    return (
        dense_chain([4, 6, 5, 3], "tanh")
        if kind == "dense"
        else conv_chain([CONVOLUTIONS[1], {"kernel_size": 2}], 3, "relu")
    )


def borrowed(curvature: object, params: Any, lr: float, momentum: float, decay: float) -> Optimizer:
    common = {"lr": lr, "momentum": momentum, "weight_decay": decay}
    if isinstance(curvature, RMSprop):
        return torch.optim.RMSprop(params, alpha=0.95, eps=1e-6, **common)
    return torch.optim.SGD(params, **common)


def choice(name: str) -> tuple[object, float]:
    return (Identity(), 0.1) if name == "sgd" else (RMSprop(alpha=0.95, eps=1e-6), 0.003)


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_feedback_off(
    kind: str, name: str, momentum: float, decay: float, clip: float | None
) -> None:
    curvature, lr = choice(name)
    model = net(kind)
    twin = copy.deepcopy(model)
    opt = DDPNOpt(
        model,
        lr=lr,
        curvature=curvature,
        momentum=momentum,
        weight_decay=decay,
        feedback=False,
    )
    fit(model, opt, clip)
    fit(twin, borrowed(curvature, twin.parameters(), lr, momentum, decay), clip)
    assert_last_rounding(model, twin)


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("value", [PAPER, "gauss_newton", "low_rank", "dense"])
def test_one_layer(
    name: str, momentum: float, decay: float, clip: float | None, value: object
) -> None:
    """Nothing below the layer, so no feedback and no own term: Table 2's update alone."""
    curvature, lr = choice(name)
    model = dense_chain([5, 3])
    twin = copy.deepcopy(model)
    opt = DDPNOpt(
        model, lr=lr, curvature=curvature, momentum=momentum, weight_decay=decay, value=value
    )
    fit(model, opt, clip)
    assert opt.last_step.terminal == "cross_entropy"
    fit(twin, borrowed(curvature, twin.parameters(), lr, momentum, decay), clip)
    assert_last_rounding(model, twin)


def test_paper_constant() -> None:
    assert PAPER == GaussNewton(match_curvature=False, backup="riccati")


def groups(model: nn.Module) -> list[dict[str, Any]]:
    layers = model.layers
    return [
        {"params": list(layers[0].parameters()), "lr": 0.2},
        {"params": [layers[1].weight], "weight_decay": 0.1},
        {"params": [layers[1].bias, *layers[2].parameters()], "momentum": 0.5, "lr": 0.02},
    ]


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_param_groups(name: str) -> None:
    curvature, lr = choice(name)
    model = net("dense")
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=lr, curvature=curvature, feedback=False, params=groups(model))
    fit(model, opt)
    fit(twin, borrowed(curvature, groups(twin), lr, 0.0, 0.0))
    assert_last_rounding(model, twin)


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize(
    "make",
    [
        lambda opt: StepLR(opt, 7, 0.5),
        lambda opt: OneCycleLR(opt, max_lr=0.02, total_steps=STEPS, cycle_momentum=False),
        lambda opt: LambdaLR(opt, lambda step: 1 / (1 + step)),
    ],
    ids=["step", "one_cycle", "lambda"],
)
def test_schedulers(name: str, momentum: float, make: Callable[[Optimizer], LRScheduler]) -> None:
    curvature, lr = choice(name)
    model = net("dense")
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=lr, curvature=curvature, momentum=momentum, feedback=False)
    other = borrowed(curvature, twin.parameters(), lr, momentum, 0.0)
    fit(model, opt, scheduler=make(opt))
    fit(twin, other, scheduler=make(other))
    assert_last_rounding(model, twin)


def test_one_cycle_with_momentum() -> None:
    model = net("dense")
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=0.1, momentum=0.9, feedback=False)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    fit(model, opt, scheduler=OneCycleLR(opt, max_lr=0.1, total_steps=STEPS))
    fit(twin, other, scheduler=OneCycleLR(other, max_lr=0.1, total_steps=STEPS))
    assert_last_rounding(model, twin)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_cycle_with_feedback(feedback: object, momentum: float) -> None:
    model = net("dense")
    before = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=0.1, momentum=momentum, feedback=feedback)
    cycle = OneCycleLR(opt, max_lr=0.1, total_steps=STEPS, cycle_momentum=momentum > 0)
    fit(model, opt, scheduler=cycle)
    assert opt.param_groups[0]["lr"] < 1e-3
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(before.layers[0].weight, model.layers[0].weight)


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_layer(feedback: object, frozen: int) -> None:
    model = net("dense")
    model.layers[frozen].requires_grad_(False)
    twin = copy.deepcopy(model)
    fit(model, DDPNOpt(model, lr=0.1, feedback=feedback), count=5)
    assert torch.equal(model.layers[frozen].weight, twin.layers[frozen].weight)
    fit(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], 0.1), count=5)
    if feedback is False:
        assert_last_rounding(model, twin)
    else:
        other = 1 if frozen == 0 else 0
        moved = (model.layers[other].weight - twin.layers[other].weight).abs().max()
        assert float(moved) > 1e-6


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_frozen_parameter_of_a_layer(which: str) -> None:
    model = net("dense")
    getattr(model.layers[1], which).requires_grad_(False)
    kept = getattr(model.layers[1], which).clone()
    twin = copy.deepcopy(model)
    fit(model, DDPNOpt(model, lr=0.1, feedback=False))
    fit(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], 0.1))
    assert torch.equal(getattr(model.layers[1], which), kept)
    assert_last_rounding(model, twin)


def test_only_some_parameters_are_optimized() -> None:
    """Parameters left out of ``params`` behave as frozen for the step but keep their gradient."""
    model = net("dense")
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=0.1, params=model.layers[1].parameters(), feedback=False)
    fit(model, opt)
    fit(twin, torch.optim.SGD(twin.layers[1].parameters(), 0.1))
    assert_last_rounding(model, twin)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_feedback_is_small_at_small_rates(feedback: object) -> None:
    """Coefficients tend to one with the learning rate: first order in it, no other difference."""
    differences = []
    for lr in (1e-3, 1e-4):
        model = net("dense")
        twin = copy.deepcopy(model)
        fit(model, DDPNOpt(model, lr=lr, feedback=feedback), count=1)
        fit(twin, torch.optim.SGD(twin.parameters(), lr), count=1)
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        differences.append(max(float((a - b).abs().max()) for a, b in pairs))
    assert differences[0] / differences[1] == pytest.approx(100, rel=0.1)
