# SPDX-License-Identifier: MIT
"""Which gradients a step is made from: those that backward added to p.grad, all, and no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.value import LowRank
from oracles.common import assert_same, data, iterate, mlp

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

LR = 0.7
# The loop as it runs with autograd's own gradients, and where no parameter but the biases, or
# none at all, gets one.
SETTINGS: dict[str, dict[str, object]] = {
    "closed": {"feedback": True},
    "open": {"feedback": "open_loop"},
    "factor": {"feedback": True, "value": LowRank()},
    "factor_open": {"feedback": "open_loop", "value": LowRank()},
    "held": {"feedback": True, "weight_gradients": False},
    "held_open": {"feedback": "open_loop", "weight_gradients": False},
    "held_factor": {"feedback": True, "weight_gradients": False, "value": LowRank()},
}
CASES = [(s, True) for s in SETTINGS] + [(s, False) for s in SETTINGS if "held" in s]
ADDING = [(s, bias) for s, bias in CASES if "open" not in s]


def net(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6, bias), nn.Tanh(), nn.Linear(6, 5, bias), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(5, 3, bias)).double()


def optimizer(model: nn.Module, setting: str) -> DDPNOpt:
    return DDPNOpt(model, lr=LR, **SETTINGS[setting])  # type: ignore[arg-type]


@lru_cache
def expected(bias: bool, setting: str, steps: int = 2) -> nn.Sequential:
    model = net(bias)
    iterate(model, optimizer(model, setting), range(steps))
    return model


def by_parameters(model: nn.Module, loss: Tensor, z: Tensor, x: Tensor) -> None:
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(3 * loss, wanted, retain_graph=True, allow_unused=True)


def by_input(model: nn.Module, loss: Tensor, z: Tensor, x: Tensor) -> None:
    torch.autograd.grad(loss, x, retain_graph=True)


def saliency(model: nn.Module, loss: Tensor, z: Tensor, x: Tensor) -> None:
    torch.autograd.grad(z[:, 1].sum(), x, retain_graph=True)


def jacobian(model: nn.Module, loss: Tensor, z: Tensor, x: Tensor) -> None:
    for column in z.T:
        torch.autograd.grad(column.sum(), x, retain_graph=True)


def penalty(model: nn.Module, loss: Tensor, z: Tensor, x: Tensor) -> None:
    torch.autograd.grad(loss, x, create_graph=True)


PROBES = [by_parameters, by_input, saliency, jacobian, penalty]


@pytest.mark.parametrize(("setting", "bias"), CASES)
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_looking_at_gradients_changes_nothing(
    setting: str, bias: bool, probe: Callable[..., None], when: str
) -> None:
    """torch.autograd.grad runs the tensor hooks too, but adds nothing to p.grad."""
    model = net(bias)
    opt = optimizer(model, setting)
    for seed in range(2):
        x, y = data(seed)
        x.requires_grad_()
        opt.zero_grad()
        z = model(x)
        loss = F.cross_entropy(z, y)
        if when == "before":
            probe(model, loss, z, x)
        loss.backward(retain_graph=True)
        if when == "after":
            probe(model, loss, z, x)
        opt.step()
    assert_same(model, expected(bias, setting))


@pytest.mark.parametrize(("setting", "bias"), CASES)
@pytest.mark.parametrize("kind", ["grad", "backward"])
@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_adversarial_inputs(setting: str, bias: bool, kind: str, clear: str) -> None:
    """The pass that makes them (FGSM) takes no part in the step on them."""
    if "held" in setting and not bias and (kind, clear) == ("backward", "model"):
        clear = "optimizer"  # no p.grad that model.zero_grad could clear: a documented limit
    model, twin = net(bias), net(bias)
    opt, plain = optimizer(model, setting), optimizer(twin, setting)
    for seed in range(2):
        x, y = data(seed)
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        if kind == "grad":
            (g,) = torch.autograd.grad(loss, x)
        else:
            loss.backward()
            g = x.grad
        assert g is not None
        adversarial = (x + 0.1 * g.sign()).detach()
        for m, o in ((model, opt), (twin, plain)):
            (o if clear == "optimizer" else m).zero_grad()
            F.cross_entropy(m(adversarial), y).backward()
            o.step()
    assert_same(model, twin)


@pytest.mark.parametrize(("setting", "bias"), CASES)
def test_gradient_only_of_the_input_is_no_backward(setting: str, bias: bool) -> None:
    model = net(bias)
    opt = optimizer(model, setting)
    x, y = data(0)
    x.requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), y), x)
    with pytest.raises(RuntimeError, match="backward"):
        opt.step()
    assert_same(model, net(bias))


@pytest.mark.parametrize(("setting", "bias"), ADDING)
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_two_backward_passes_through_one_graph_add_up(
    setting: str, bias: bool, share: float
) -> None:
    model = net(bias)
    opt = optimizer(model, setting)
    for seed in range(2):
        x, y = data(seed)
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (share * loss).backward(retain_graph=True)
        ((1 - share) * loss).backward()
        opt.step()
    assert_same(model, expected(bias, setting), 1e-12)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "open" not in s])
def test_two_losses_of_one_graph_add_up(setting: str) -> None:
    """Half of the samples each: neither part is the whole loss."""
    model = net(True)
    opt = optimizer(model, setting)
    for seed in range(2):
        x, y = data(seed)
        opt.zero_grad()
        parts = F.cross_entropy(model(x), y, reduction="none") / len(y)
        parts[:3].sum().backward(retain_graph=True)
        parts[3:].sum().backward()
        opt.step()
    assert_same(model, expected(True, setting), 1e-12)


@pytest.mark.parametrize(("setting", "bias"), CASES)
@pytest.mark.parametrize("first", [1.0, 7.0])
def test_gradients_cleared_between_two_backward_passes(
    setting: str, bias: bool, first: float
) -> None:
    """The graph lives on; only the second pass is in p.grad, so only it counts."""
    model = net(bias)
    opt = optimizer(model, setting)
    for seed in range(2):
        x, y = data(seed)
        loss = F.cross_entropy(model(x), y)
        (first * loss).backward(retain_graph=True)
        opt.zero_grad()
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert_same(model, expected(bias, setting), 1e-13)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_cleared_by_the_model_between(setting: str) -> None:
    """Nobody tells the optimizer; it finds p.grad empty."""
    model = net(True)
    opt = optimizer(model, setting)
    for seed in range(2):
        x, y = data(seed)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        opt.step()
        model.zero_grad()
    assert_same(model, expected(True, setting), 1e-13)


@pytest.mark.parametrize("setting", SETTINGS)
def test_backward_that_fails_leaves_nothing(setting: str) -> None:
    """An exception half-way through a backward pass; the next pass is as if it had not been."""
    model = net(True)
    opt = optimizer(model, setting)
    x, y = data(5)

    def fail(g: Tensor) -> Tensor:
        raise ArithmeticError("stop")

    handle = model[2].register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
    with pytest.raises(ArithmeticError):
        F.cross_entropy(model(x), y).backward()
    handle.remove()
    model.zero_grad()
    iterate(model, opt, range(2))
    assert_same(model, expected(True, setting))


def test_the_probes_are_seen_by_the_hooks() -> None:
    """What these tests rely on: autograd.grad runs hooks on tensors."""
    model, seen = mlp(), []
    x, y = data(0)
    x.requires_grad_()
    z = model(x)
    z.register_hook(seen.append)
    by_input(model, F.cross_entropy(z, y), z, x)
    assert len(seen) == 1
