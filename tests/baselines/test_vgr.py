# SPDX-License-Identifier: MIT
"""The vanishing-gradient regulariser against Omega written out, and in the plain loop."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import SGDVGR, DDPNOptWarning, NonFiniteError
from ddpnopt.experiments.optimizers import build_optimizer
from oracles.common import (
    CONVOLUTIONS,
    assert_same,
    assert_unchanged,
    conv_chain,
    data,
    dense_chain,
    distance,
    identity,
    input_for,
    iterate,
    mlp,
    snapshot,
)
from oracles.flat import Chain
from oracles.vgr import by_hand, norms, omega

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


def labels(x: Tensor, classes: int = 3) -> Tensor:
    return torch.arange(len(x)) % classes


CHAINS: dict[str, Callable[[], Chain]] = {
    "tanh": lambda: dense_chain([4, 5, 6, 3], "tanh"),
    "sigmoid": lambda: dense_chain([4, 5, 6, 6, 3], "sigmoid"),
    "no_bias": lambda: dense_chain([4, 5, 3], "tanh", bias=False),
    "norms": norms,
    "conv": lambda: conv_chain([CONVOLUTIONS[0], CONVOLUTIONS[3]]),
    "stride": lambda: conv_chain([CONVOLUTIONS[1], CONVOLUTIONS[5]], activation="sigmoid"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_step_is_that_on_omega(name: str) -> None:
    model, twin = CHAINS[name](), CHAINS[name]()
    x = input_for(model, 5)
    opt = SGDVGR(model, lr=0.2, strength=0.7)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(x), labels(x)).backward()
        opt.step()
        by_hand(twin, x, lambda z: F.cross_entropy(z, labels(z)), 0.2, 0.7)
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("loss", ["focal", "mse"])
def test_any_loss_will_do(loss: str) -> None:
    """No loss has to be recognised or named."""
    model, twin = CHAINS["tanh"](), CHAINS["tanh"]()
    x = input_for(model, 5)

    def function(z: Tensor) -> Tensor:
        if loss == "mse":
            return F.mse_loss(z, torch.ones_like(z))
        p = z.softmax(1).gather(1, labels(z)[:, None])
        return ((1 - p) ** 2 * -p.log()).mean()

    opt = SGDVGR(model, lr=0.2, strength=0.7)
    function(model(x)).backward()
    opt.step()
    by_hand(twin, x, function, 0.2, 0.7)
    assert_same(model, twin, 1e-12)
    assert opt.last_step is not None and opt.last_step.depth == "closed_loop"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_strength_zero_is_sgd_to_the_bit(momentum: float, weight_decay: float) -> None:
    model, twin = mlp(), mlp()
    options = {"lr": 0.3, "momentum": momentum, "weight_decay": weight_decay}
    iterate(model, SGDVGR(model, strength=0.0, **options), range(8))
    iterate(twin, torch.optim.SGD(twin.parameters(), **options), range(8))
    assert_same(model, twin)


def test_momentum_and_decay_act_on_the_regularised_gradient() -> None:
    model, twin = CHAINS["tanh"](), CHAINS["tanh"]()
    x = input_for(model, 5)
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02}
    opt, sgd = SGDVGR(model, strength=0.3, **options), torch.optim.SGD(twin.parameters(), **options)
    for _ in range(4):
        opt.zero_grad()
        F.cross_entropy(model(x), labels(x)).backward()
        opt.step()
        sgd.zero_grad()
        loss = F.cross_entropy(twin(x), labels(x))
        own = omega(twin, x, lambda z: F.cross_entropy(z, labels(z)))
        (loss + 0.3 * own).backward()
        sgd.step()
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("parts", [[3, 3], [1, 5], [2, 2, 2]])
def test_accumulation_is_the_whole_batch(parts: list[int]) -> None:
    whole, split = mlp(), mlp()
    x, y = data()
    opt = SGDVGR(whole, lr=0.2, strength=0.5)
    F.cross_entropy(whole(x), y).backward()
    opt.step()
    opt = SGDVGR(split, lr=0.2, strength=0.5)
    for a, b in zip(x.split(parts), y.split(parts), strict=True):
        (F.cross_entropy(split(a), b) * len(a) / len(x)).backward()
    opt.step()
    assert_same(whole, split, 1e-13)


def test_clipping_scales_the_loss_alone() -> None:
    """Omega does not depend on the scale of G."""
    model, twin = CHAINS["tanh"](), CHAINS["tanh"]()
    x = input_for(model, 5)
    opt = SGDVGR(model, lr=0.2, strength=0.5)
    (F.cross_entropy(model(x), labels(x)) * 1024).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 4096
    opt.step()
    by_hand(twin, x, lambda z: F.cross_entropy(z, labels(z)) / 4, 0.2, 0.5)
    assert_same(model, twin, 1e-12)


def test_a_deep_sigmoid_net_learns_as_omega_falls() -> None:
    """Plain SGD stays at log 3, the loss of a constant output."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = {}
    for strength in (0.0, 0.3):
        model = dense_chain([4, 8, 8, 8, 8, 8, 3], "sigmoid")
        opt = SGDVGR(model, lr=0.5, strength=strength)
        for _ in range(300):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), labels(x))
            loss.backward()
            opt.step()
        final = omega(model, x, lambda z: F.cross_entropy(z, labels(z))).detach()
        found[strength] = float(loss.detach()), float(final)
    assert found[0.0][0] > 1.09 and found[0.0][1] > 3.5
    assert found[0.3][0] < 0.8 and found[0.3][1] < 1.0


@pytest.mark.parametrize("name", ["positions", "unbatched"])
def test_a_sample_is_all_its_positions(name: str) -> None:
    """Ratios are of whole samples; a single sample without a batch axis is a batch of one."""
    torch.manual_seed(0)
    tail = (nn.Flatten(), nn.Linear(9, 3)) if name == "positions" else ()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), *tail).double()
    twin = copy.deepcopy(model)
    x = torch.randn(*((6, 3, 4) if name == "positions" else (4,)), dtype=torch.float64)
    y = torch.arange(6) % 3 if name == "positions" else torch.tensor(1)
    opt = SGDVGR(model, lr=0.2, strength=0.7)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    layers = [m for m in twin if isinstance(m, nn.Linear)]
    chain = Chain(layers, [torch.tanh, lambda h: h.flatten(1), identity][: len(layers)])
    if name == "unbatched":
        chain.after[-1], x, y = identity, x[None], y[None]
    by_hand(chain, x, lambda z: F.cross_entropy(z, y), 0.2, 0.7)
    assert_same(model, twin, 1e-12)


@pytest.mark.parametrize("form", ["autocast", "half"])
def test_half_precision(form: str) -> None:
    model, twin = mlp().float(), mlp().float()
    x, y = data()
    half = form == "half"
    model = model.bfloat16() if half else model
    opt, other = SGDVGR(model, lr=0.2, strength=0.5), SGDVGR(twin, lr=0.2, strength=0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=not half):
        loss = F.cross_entropy(model(x.bfloat16() if half else x.float()), y)
    loss.backward()
    opt.step()
    F.cross_entropy(twin(x.float()), y).backward()
    other.step()
    assert 0 < distance(model.float(), twin) < 0.02


# Edges ------------------------------------------------------------------------------------------


def test_samples_without_a_gradient_contribute_nothing() -> None:
    model, twin = mlp(), mlp()
    x, y = data()
    opt = SGDVGR(model, lr=0.2, strength=0.5)
    before = snapshot(model)
    (F.cross_entropy(model(x), y) * 0).backward()
    opt.step()
    assert_unchanged(model, before)
    # Two ignored labels: Omega's mean is still over all samples, ignored ones are zero in it.
    masked = y.clone()
    masked[4:] = -100
    opt.zero_grad()
    F.cross_entropy(model(x), masked).backward()
    opt.step()
    other = SGDVGR(twin, lr=0.2, strength=0.5 * 4 / 6)
    F.cross_entropy(twin(x[:4]), y[:4]).backward()
    other.step()
    assert_same(model, twin, 1e-13)


def test_dead_layers_give_no_nan() -> None:
    model = mlp(activation=nn.ReLU)
    x, y = data()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is off: no gradient arrives in front
    opt = SGDVGR(model, lr=0.2, strength=0.5)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_vanishing_gradients_do_not_underflow() -> None:
    """Gradients of 1e-30 in float32, whose squares are 0: the ratios are those of the scale 1."""
    models = [mlp().float(), mlp().float()]
    x, y = data()
    for model, scale in zip(models, (1.0, 2.0**-100), strict=True):
        opt = SGDVGR(model, lr=0.2, strength=0.5)
        (F.cross_entropy(model(x.float()), y) * scale).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.zero_()
        opt.step()
    assert distance(models[0], mlp().float()) > 1e-3
    assert_same(*models, 1e-6)


def test_layers_between_are_seen_as_they_were_in_the_pass() -> None:
    """A parameter outside the feedback moves first; Omega is that of the old one."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(torch.tanh(self.scale * self.one(x)))
            return out

    model = Scaled().double()
    twin = copy.deepcopy(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    opt = SGDVGR(model, lr=0.5, strength=0.7)
    F.cross_entropy(model(x), labels(x)).backward()
    with pytest.warns(DDPNOptWarning, match="'scale'"):
        opt.step()
    scale = twin.scale
    chain = Chain([twin.one, twin.two], [lambda h: torch.tanh(scale * h), lambda h: h])
    plain = torch.autograd.grad(F.cross_entropy(twin(x), labels(x)), scale)[0]
    by_hand(chain, x, lambda z: F.cross_entropy(z, labels(z)), 0.5, 0.7)
    with torch.no_grad():
        scale -= 0.5 * plain
    assert_same(model, twin, 1e-12)


def test_in_front_of_batch_norm_the_step_is_plain() -> None:
    torch.manual_seed(0)
    front = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
    model = nn.Sequential(*front, nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4, dtype=torch.float64)
    opt, sgd = SGDVGR(model, lr=0.2, strength=0.5), torch.optim.SGD(twin.parameters(), 0.2)
    for net, optimizer in ((model, opt), (twin, sgd)):
        F.cross_entropy(net(x), labels(x)).backward()
        if optimizer is opt:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                opt.step()
            assert [str(one.message)[:32] for one in said] == [
                "'0' take the borrowed optimizer'",
                "'1' take the borrowed optimizer'",
            ]
        else:
            sgd.step()
    for index in (0, 1, 3):  # the first behind the norm has none before it that counts
        assert_same(model[index], twin[index], 1e-14)
    assert distance(model[5], twin[5]) > 1e-4


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = mlp()
    before = snapshot(model)
    x, y = data()
    opt = SGDVGR(model, lr=1e308, strength=1e10)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(NonFiniteError):
        opt.step()
    assert_unchanged(model, before)


def test_state_resumes_to_the_bit() -> None:
    model, twin = mlp(), mlp()
    options: dict[str, Any] = {"lr": 0.1, "strength": 0.3, "momentum": 0.9}
    opt, resumed = SGDVGR(model, **options), SGDVGR(twin, **options)
    iterate(model, opt, range(3))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    iterate(model, opt, range(3, 6))
    iterate(twin, resumed, range(3, 6))
    assert_same(model, twin)


def test_a_dropped_optimizer_is_freed() -> None:
    model = mlp()
    opt = SGDVGR(model)
    iterate(model, opt, range(1))
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        SGDVGR(mlp(), strength=strength)


def test_groups_have_no_curvature_of_their_own() -> None:
    model = mlp()
    params = list(model.parameters())
    SGDVGR(model, params=[{"params": params, "curvature": "identity"}])
    with pytest.raises(ValueError, match="curvature='rmsprop'"):
        SGDVGR(model, params=[{"params": params, "curvature": "rmsprop"}])


def test_it_is_in_the_registry() -> None:
    built = build_optimizer("sgd-vgr", mlp(), 0.2, {"strength": 0.25, "momentum": 0.5})
    assert isinstance(built.optimizer, SGDVGR)
