# SPDX-License-Identifier: MIT
"""weight_gradients=False: the same results without ever computing a weight gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning, NonFiniteError, UnsupportedModelError
from ddpnopt.value import Dense, GaussNewton, LowRank, Moreau
from oracles.common import assert_same, assert_unchanged, data, distance, iterate, mlp, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")

LR = 0.7
FEEDBACKS = [True, "open_loop"]


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_equals_the_plain_loop(feedback: object, momentum: float) -> None:
    model, twin = mlp(), mlp()
    options = {"value": Moreau(coupling=False), "feedback": feedback, "momentum": momentum}
    iterate(model, DDPNOpt(model, lr=LR, weight_gradients=False, **options), range(4))
    iterate(twin, DDPNOpt(twin, lr=LR, **options), range(4))
    assert_same(model, twin, 1e-11)


@pytest.mark.parametrize("value", [GaussNewton(), LowRank(), Dense()])
def test_quadratic_values(value: object) -> None:
    model, twin = mlp(), mlp()
    iterate(model, DDPNOpt(model, lr=LR, weight_gradients=False, value=value), range(3))
    iterate(twin, DDPNOpt(twin, lr=LR, value=value), range(3))
    assert_same(model, twin, 1e-11)


def test_with_rmsprop() -> None:
    model, start = mlp(), mlp()
    opt = DDPNOpt(model, lr=0.01, curvature="rmsprop", weight_gradients=False)
    iterate(model, opt, range(3))
    assert distance(model, start) > 1e-3
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_running_coupling_is_near_the_instantaneous_one() -> None:
    model, twin = mlp(), mlp()
    iterate(model, DDPNOpt(model, lr=LR, weight_gradients=False), [0])
    iterate(twin, DDPNOpt(twin, lr=LR), [0])
    # First step: 1^T Gram 1 is the batch gradient's norm, so even that agrees.
    assert_same(model, twin, 1e-11)
    iterate(model, DDPNOpt(model, lr=LR, weight_gradients=False), range(5))
    iterate(twin, DDPNOpt(twin, lr=LR), range(5))
    assert 0 < distance(model, twin) < 0.3


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_weights_have_no_gradient(feedback: object) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback, weight_gradients=False)
    x, y = data()
    assert all(p.requires_grad for p in model.parameters())
    z = model(x)
    assert all(p.requires_grad for p in model.parameters())
    F.cross_entropy(z, y).backward()
    assert all(model[k].weight.grad is None for k in (0, 2, 4))
    opt.step()
    assert all(p.requires_grad for p in model.parameters())
    assert all(model[k].weight.grad is None for k in (0, 2, 4))


def test_forward_that_raises_keeps_requires_grad() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR, weight_gradients=False)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 7, dtype=torch.float64))
    assert all(p.requires_grad for p in model.parameters())
    iterate(model, opt, range(2))
    assert distance(model, mlp()) > 0


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU])
def test_in_place_activations(feedback: object, bias: bool, activation: type[nn.Module]) -> None:
    """In place right after any layer, also the first, where nothing else needs a gradient."""

    def build(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 6, bias=bias),
            activation(inplace=inplace),
            nn.Linear(6, 5, bias=bias),
            activation(inplace=inplace),
            nn.Linear(5, 3, bias=bias),
        ).double()

    model, twin = build(True), build(False)
    options = {"feedback": feedback, "value": Moreau(coupling=False)}
    iterate(model, DDPNOpt(model, lr=LR, weight_gradients=False, **options), range(3))
    iterate(twin, DDPNOpt(twin, lr=LR, **options), range(3))
    assert_same(model, twin, 1e-11)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_convolutions_with_in_place_activations(feedback: object) -> None:
    def build(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, bias=False),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(2, 2, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
        ).double()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    models = []
    for inplace in (True, False):
        model = build(inplace)
        opt = DDPNOpt(
            model,
            lr=LR,
            feedback=feedback,
            value=Moreau(coupling=False),
            weight_gradients=not inplace,
            gram="exact",
        )
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        models.append(model)
    assert_same(models[0], models[1], 1e-11)


def test_evaluation_has_its_gradients() -> None:
    """A copy of the model is an ordinary model with ordinary gradients."""
    model = mlp()
    opt = DDPNOpt(model, lr=LR, weight_gradients=False)
    iterate(model, opt, [0])
    twin = copy.deepcopy(model)
    x, y = data(1)
    F.cross_entropy(twin(x), y).backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_clipping_is_warned_of() -> None:
    with pytest.warns(DDPNOptWarning, match="clip_grad_norm_"):
        model = mlp()
        opt = DDPNOpt(model, lr=LR, weight_gradients=False)
        x, y = data()
        F.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        opt.step()


def test_grad_scaler_works_or_is_refused_by_name() -> None:
    model, twin = mlp(), mlp()
    value = Moreau(coupling=False)
    opt = DDPNOpt(model, lr=LR, weight_gradients=False, value=value)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = snapshot(model)
    x, y = data()
    try:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
    except (UnsupportedModelError, RuntimeError) as error:
        assert "GradScaler" in str(error) and "weight_gradients" in str(error)
        assert_unchanged(model, before)
        return
    iterate(twin, DDPNOpt(twin, lr=LR, value=value), [0])
    assert_same(model, twin, 1e-11)


def test_feedback_off_needs_them() -> None:
    """Exactly the borrowed optimizer still, or refused at construction; no silent standstill."""
    model, twin = mlp(), mlp()
    try:
        opt = DDPNOpt(model, lr=LR, feedback=False, weight_gradients=False)
    except ValueError as error:
        assert "weight_gradients" in str(error)
        return
    iterate(model, opt, range(3))
    iterate(twin, torch.optim.SGD(twin.parameters(), LR), range(3))
    assert_same(model, twin, 1e-13)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_unrecognised_loss_still_trains_plainly(feedback: object) -> None:
    """The weight gradients are formed at step then."""
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback, weight_gradients=False)
    sgd = torch.optim.SGD(twin.parameters(), LR)
    for seed in range(2):
        x, _ = data(seed)
        for m, o in ((model, opt), (twin, sgd)):
            o.zero_grad()
            m(x).pow(2).mean().backward()
            o.step()
    assert_same(model, twin, 1e-12)


class Spoilt(nn.Module):
    """Passes its input on; one entry of the gradient that comes back is spoilt."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(self.spoil)
        return x

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[1] = self.bad
        return spoilt


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("behind", ["convolution", "dense"])
def test_a_gradient_that_is_not_finite_is_found_with_and_without_biases(
    behind: str, bias: bool, bad: float
) -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(2, 3, 2, bias=bias), nn.Linear(12, 3, bias=bias)
    spoilt, through = Spoilt(bad), nn.Identity()
    places = (spoilt, through) if behind == "convolution" else (through, spoilt)
    model = nn.Sequential(first, places[0], nn.Flatten(), last, places[1]).double()
    opt = DDPNOpt(model, lr=0.1, weight_gradients=False, feedback="open_loop")
    before = snapshot(model)
    F.cross_entropy(model(torch.randn(4, 2, 3, 3).double()), torch.arange(4) % 3).backward()
    found = "the gradient at '0" if behind == "convolution" else "not finite"
    with pytest.raises(NonFiniteError, match=found):
        opt.step()
    assert_unchanged(model, before)
