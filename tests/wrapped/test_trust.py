# SPDX-License-Identifier: MIT
"""`Feedback(..., trust=True)`: no unit's step is longer than a share of the unit."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

import ddpnopt
from ddpnopt import DDPNOpt, Feedback, UnsupportedModelError
from ddpnopt.curvature import AdamW, RMSprop, Trust
from wrapped.common import assert_equal, batch, conv, dense, ones, train

PAIRS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "adamw": (optim.AdamW, {"weight_decay": 0.1}, AdamW(), {"weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"weight_decay": 0.1}, RMSprop(), {"weight_decay": 0.1}),
    "rmsprop momentum": (optim.RMSprop, {"momentum": 0.5}, RMSprop(), {"momentum": 0.5}),
    "sgd": (
        optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.1},
        "identity",
        {"momentum": 0.9, "weight_decay": 0.1},
    ),
}
DEPTHS = [True, "open_loop", False]


def lion(parameters: Any, lr: float) -> optim.Optimizer:
    """The sign of the gradient: nothing is known about it, and its length says nothing."""

    class Signs(optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

    return Signs(parameters, {"lr": lr})


def lengths(t: Tensor) -> Tensor:
    """Of every unit; a vector is one."""
    return t.flatten(1).norm(dim=1) if t.dim() > 1 else t.norm()


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("tau", [None, 0.05])
def test_the_same_as_the_bounded_curvature(kind: str, depth: Any, tau: float | None) -> None:
    cls, options, inner, own = PAIRS[kind]
    lr = 1.0 if kind == "sgd" else 0.1
    results = []
    for bound in (True, False, None):
        model = dense().double()
        opt: optim.Optimizer = cls(model.parameters(), lr=lr, **options)
        if bound:
            opt = Feedback(model, opt, feedback=depth, trust=True if tau is None else tau)
        elif bound is False:
            opt = DDPNOpt(model, lr=lr, feedback=depth, curvature=Trust(inner, tau), **own)
        else:
            opt = Feedback(model, opt, feedback=depth)
        for number in range(20):
            x, y = batch(model, number)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)
    assert float((results[0] - results[2]).abs().max()) > 1e-3  # the bound did something


MAKERS: dict[str, Any] = {
    "SGD": lambda p: optim.SGD(p, lr=1e4),
    "Adam": lambda p: optim.Adam(p, lr=10.0),
    "Adam amsgrad": lambda p: optim.Adam(p, lr=10.0, amsgrad=True),
    "NAdam": lambda p: optim.NAdam(p, lr=10.0),
    "RMSprop": lambda p: optim.RMSprop(p, lr=10.0),
    "RMSprop centred": lambda p: optim.RMSprop(p, lr=10.0, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=10.0),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1e6),
    "Adamax": lambda p: optim.Adamax(p, lr=10.0),
    "signs": lambda p: lion(p, lr=10.0),
    "Rprop": lambda p: optim.Rprop(p, lr=10.0),
}


@pytest.mark.filterwarnings("ignore:each sample is weighted once")  # BatchNorm
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("net", [dense, conv])
def test_no_unit_moves_further(net: Any, kind: str, depth: Any) -> None:
    """In the first step: later on momentum adds steps up."""
    model = net().double()
    opt = Feedback(model, MAKERS[kind](model.parameters()), feedback=depth, trust=True)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(model, 0)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    tau = math.log(2) / sum(p.dim() > 1 for p in before)
    shares = []
    for p, old in zip(model.parameters(), before, strict=True):
        shares.append(lengths(p.detach() - old) / (tau * lengths(old).clamp(min=1e-3)))
    share = torch.cat([s.flatten() for s in shares])
    # NAdam steps a little further than its average says, Adadelta's first step is guessed.
    assert float(share.max()) <= (1.2 if kind == "NAdam" else 1 + 1e-6)
    assert float(share.max()) > 0.2  # and the bound is what holds it


@pytest.mark.parametrize("way", ["off", "closed", "open"])
@pytest.mark.parametrize("kind", [*MAKERS, "Muon"])
def test_within_the_bound_it_is_the_optimizer_to_the_bit(kind: str, way: str) -> None:
    def make(model: nn.Module) -> Any:
        if kind == "Muon":
            matrices = [p for p in model.parameters() if p.dim() == 2]
            rest = [p for p in model.parameters() if p.dim() != 2]
            return [optim.Muon(matrices, lr=0.01), optim.SGD(rest, lr=0.01)]
        opt = MAKERS[kind](model.parameters())
        opt.param_groups[0]["lr"] = 0.01
        return opt

    ways = {
        "off": lambda m, o: Feedback(m, o, feedback=False, trust=1e9),
        "closed": lambda m, o: Feedback(m, o, terminal=ones, trust=1e9),
        "open": lambda m, o: Feedback(m, o, terminal=ones, feedback="open_loop", trust=1e9),
    }
    assert_equal(train(dense, make, ways[way]), train(dense, make))


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_second_moment_sees_the_whole_gradient(depth: Any) -> None:
    """Adam would undo the bound; v is that of the unbounded optimizer's first step."""
    model = dense().double()
    twin = copy.deepcopy(model)
    inner = optim.AdamW(model.parameters(), lr=10.0)
    plain = optim.AdamW(twin.parameters(), lr=10.0)
    opt = Feedback(model, inner, feedback=depth, trust=True)
    other = Feedback(twin, plain, feedback=depth)
    for net, one in ((model, opt), (twin, other)):
        x, y = batch(net, 0)
        F.cross_entropy(net(x), y).backward()
        one.step()
    last = [inner.state[p]["exp_avg_sq"] for p in model.parameters()][-1]
    theirs = [plain.state[p]["exp_avg_sq"] for p in twin.parameters()][-1]
    # The last layer's d is the same in both: nothing comes behind it, and S is capped by the bound.
    assert float((last / theirs).min()) > 0.9


@pytest.mark.parametrize("kind", ["Adam", "signs", "SGD"])
def test_a_copy_and_a_saved_state_go_on_as_the_original(kind: str) -> None:
    def steps(net: nn.Module, opt: Any, first: int) -> None:
        for number in range(first, first + 3):
            x, y = batch(net, number)
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()

    model = dense().double()
    opt = Feedback(model, MAKERS[kind](model.parameters()), trust=0.1)
    steps(model, opt, 0)
    if kind != "signs":  # a class of a function can't be copied
        copied, again = copy.deepcopy((model, opt))
        assert again.trust == 0.1
    other = dense().double()
    other.load_state_dict(model.state_dict())
    resumed = Feedback(other, MAKERS[kind](other.parameters()), trust=0.1)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(model, opt, 3)
    steps(other, resumed, 3)
    twins = [other]
    if kind != "signs":
        steps(copied, again, 3)
        twins.append(copied)
    for twin in twins:
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


def test_several_optimizers_count_their_layers_together() -> None:
    model = dense().double()
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    opt = Feedback(model, [optim.SGD(weights, lr=1e4), optim.Adam(rest, lr=1e4)], trust=True)
    before = [p.detach().clone() for p in weights]
    x, y = batch(model, 0)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    for p, old in zip(weights, before, strict=True):
        share = lengths(p.detach() - old) / lengths(old)
        assert float(share.max()) <= math.log(2) / 3 + 1e-9
    assert float(share.max()) > math.log(2) / 4


def test_a_failed_step_loses_nothing() -> None:
    model = dense().double()
    inner = optim.AdamW(model.parameters(), lr=0.1)
    opt = Feedback(model, inner, trust=True)
    for number in range(3):
        x, y = batch(model, number)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if number == 2:
            state = {p: {k: v.clone() for k, v in s.items()} for p, s in inner.state.items()}
            before = [p.detach().clone() for p in model.parameters()]
            inner.param_groups[0]["weight_decay"] = float("nan")
            with pytest.raises(ddpnopt.NonFiniteError):
                opt.step()
            for p, old in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, old)
            for p, s in state.items():
                for name, value in s.items():
                    assert torch.equal(inner.state[p][name], value)
        else:
            opt.step()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [10.0, 1e4])
def test_the_bound_holds_in_every_precision(dtype: torch.dtype, lr: float, depth: Any) -> None:
    """The factor times the precision is no error of the step."""
    model = dense().to(dtype)
    opt = Feedback(model, optim.SGD(model.parameters(), lr=lr), feedback=depth, trust=True)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(model, 0)
    F.cross_entropy(model(x).float(), y).backward()
    opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        moved = lengths((p.detach() - old).double())
        share = moved / (math.log(2) / 3 * lengths(old.double()).clamp(min=1e-3))
        coarse = 4 * torch.finfo(dtype).eps / (math.log(2) / 3)  # of the weights themselves
        assert float(share.max()) < 1 + coarse
        assert float(share.max()) > 0.3


def test_the_bound_is_fixed() -> None:
    model = dense()
    opt: Any = Feedback(model, optim.SGD(model.parameters(), lr=0.1), trust=0.5)
    assert opt.trust == 0.5
    with pytest.raises(AttributeError):
        opt.trust = 0.1


@pytest.mark.parametrize(
    "trust", [0, -1.0, math.nan, math.inf, "yes", None, np.True_, torch.tensor(True)]
)
def test_bad_bounds_are_named(trust: Any) -> None:
    model = dense()
    with pytest.raises(ValueError, match="trust"):
        Feedback(model, optim.SGD(model.parameters(), lr=0.1), trust=trust)


def test_the_brake_has_its_own() -> None:
    model = dense()
    with pytest.raises(ValueError, match="leave trust out"):
        Feedback(model, optim.SGD(model.parameters(), lr=0.1), mode="brake", trust=True)


def test_sparse_gradients_are_refused_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).mean(1))

    model = Net()
    opt = Feedback(model, optim.SGD(model.parameters(), lr=0.1), trust=True)
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(torch.randint(10, (4, 3))), torch.tensor([0, 1, 2, 0])).backward()
    with pytest.raises(UnsupportedModelError, match=r"table\.weight.*leave trust out"):
        opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("passes", [True, False])
def test_recorded_steps_are_bounded_too(passes: bool) -> None:
    ends = []
    for recorded in (True, False):
        model = dense().double()
        inner = optim.AdamW(model.parameters(), lr=0.5, fused=True)
        opt = Feedback(model, inner, trust=True)
        capturing = ddpnopt.capture(opt, passes=passes, compile=False) if recorded else None
        for number in range(12):
            x, y = batch(model, number)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        if capturing is not None:
            assert capturing.replayed > 0, capturing.reason
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)
