# SPDX-License-Identifier: MIT
"""Vanilla DDP: linear-quadratic problems, dense algebra of the augmented state, the line search."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from sklearn.datasets import load_wine
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, DDPNOptWarning, TerminalError, UnsupportedModelError, VanillaDDP
from ddpnopt.value import Augmented, Dense, LowRank
from ddpnopt.value.explicit import Explicit
from oracles.common import (
    assert_params,
    assert_same,
    chains,
    conv_chain,
    cross_entropy,
    dense_chain,
    input_for,
    squared,
)
from oracles.flat import Chain
from oracles.full_q import FullQ

LR = 0.7


def step(opt: torch.optim.Optimizer, model: nn.Module, x: Tensor, loss: Any) -> None:
    opt.zero_grad()
    loss(model(x)).backward()
    opt.step()


# Linear-quadratic problems -----------------------------------------------------------------------


@hypothesis.given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_one_sweep_solves_least_squares(
    form: str, seed: int, inputs: int, outputs: int, batch: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(inputs, outputs).double()
    x, y = torch.randn(batch, inputs).double(), torch.randn(batch, outputs).double()
    opt = VanillaDDP(model, lr=1e7, terminal="mse", form=form)
    step(opt, model, x, lambda z: F.mse_loss(z, y))
    known = torch.cat([x, torch.ones(batch, 1).double()], 1)
    best = known @ torch.linalg.lstsq(known, y, driver="gelsd").solution
    assert opt.alpha == 1.0
    assert float(F.mse_loss(model(x), y)) <= float(F.mse_loss(best, y)) + 1e-6


@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_one_sweep_solves_a_linear_quadratic_control_problem(form: str) -> None:
    """x' = A x + u: only the biases are controls; the cost is quadratic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()
    for layer in model:
        layer.weight.requires_grad_(False)
    x, y = torch.randn(9, 4).double(), torch.randn(9, 3).double()
    best = float((y - (y - model(x)).mean(0) - model(x)).square().mean().detach())
    opt = VanillaDDP(model, lr=1e7, terminal="mse", form=form)
    step(opt, model, x, lambda z: F.mse_loss(z, y))
    assert opt.alpha == 1.0
    assert float(F.mse_loss(model(x), y)) == pytest.approx(best, abs=1e-9)


# Dense algebra -----------------------------------------------------------------------------------


def compare(model: Chain, second: bool, loss: str = "cross_entropy", **options: Any) -> None:
    x = input_for(model, 4)
    outputs = model(x).shape[1]
    _, function, hessian = (cross_entropy if loss == "cross_entropy" else squared)(x, outputs)
    reference = FullQ(
        copy.deepcopy(model),
        LR,
        second=second,
        joint=True,
        own_layer=True,
        regularization=options.get("regularization", 0.0),
    )
    opt = VanillaDDP(model, lr=LR, terminal=loss, line_search=False, **options)
    for _ in range(2):
        reference.step(x, function, hessian)
        step(opt, model, x, function)
    assert_params(model, reference.params)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "relu"])
@pytest.mark.parametrize("form", ["dense", "low_rank"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_first_order_equals_dense_algebra(activation: str, form: str, loss: str) -> None:
    compare(dense_chain([3, 5, 4, 3], activation), False, loss, form=form)


@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_second_order_equals_dense_algebra(activation: str, regularization: float) -> None:
    model = dense_chain([3, 5, 4, 3], activation)
    compare(model, True, dynamics="second_order", regularization=regularization)


@pytest.mark.parametrize("second", [False, True])
def test_convolutions(second: bool) -> None:
    model = conv_chain([{"kernel_size": 3}, {"kernel_size": 2}], 3, "softplus")
    compare(model, second, dynamics="second_order" if second else "first_order")


@pytest.mark.parametrize("second", [False, True])
def test_the_value_itself(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """V_x and V_xx over all samples, at every state."""
    model = dense_chain([3, 4, 4, 3])
    x = input_for(model, 4)
    _, function, hessian = cross_entropy(x, 3)
    reference = FullQ(copy.deepcopy(model), LR, second=second, joint=True, own_layer=True)
    reference.sweep(x, function, hessian)
    found, plain = [], Explicit.back

    def back(self: Explicit, maps: Any, bottom: bool) -> Any:
        policy = plain(self, maps, bottom)
        found.append(self.V)
        return policy

    monkeypatch.setattr(Explicit, "back", back)
    dynamics = "second_order" if second else "first_order"
    opt = VanillaDDP(model, lr=LR, form="dense", dynamics=dynamics)
    step(opt, model, x, function)
    for V, policies in zip(found[:2], reference.policies[:0:-1], strict=True):
        torch.testing.assert_close(V[0][0], policies[0].V_x)
        torch.testing.assert_close(V[1][0], policies[0].V_xx)


@pytest.mark.parametrize("curvature", ["identity", "rmsprop", "adamw", "kfac", "ekfac"])
def test_one_sample_with_the_borrowed_curvature_is_dense_riccati(curvature: str) -> None:
    model, twin = dense_chain([3, 5, 4, 3]), dense_chain([3, 5, 4, 3])
    x = input_for(model, 1)
    _, function, _ = cross_entropy(x, 3)
    own: dict[str, Any] = {"lr": 0.01, "terminal": "cross_entropy", "curvature": curvature}
    first = VanillaDDP(model, Q_uu="curvature", line_search=False, **own)
    second = DDPNOpt(twin, value=Dense(backup="riccati"), **own)
    for _ in range(3):
        step(first, model, x, function)
        step(second, twin, x, function)
    assert_same(model, twin, 1e-12)


@hypothesis.given(chains(), st.sampled_from([0.1, 3.0, 1e4]))
def test_terminal_coordinates_equal_the_dense_form(case: Any, lr: float) -> None:
    model, x, outputs = case
    twin = copy.deepcopy(model)
    _, function, _ = cross_entropy(x, outputs)
    for m, form in ((model, "dense"), (twin, "low_rank")):
        opt = VanillaDDP(m, lr=lr, form=form, terminal="cross_entropy", line_search=False)
        step(opt, m, x, function)
    assert_same(model, twin, 1e-7)


def test_it_couples_the_samples() -> None:
    found = []
    for value in (Augmented(LowRank(own_layer=True)), LowRank(own_layer=True)):
        model = dense_chain([3, 4, 3])
        x = input_for(model, 4)
        _, function, _ = cross_entropy(x, 3)
        step(DDPNOpt(model, lr=LR, value=value), model, x, function)
        found.append(model.layers[0].weight.detach().clone())
    assert float((found[0] - found[1]).norm()) > 1e-4


@pytest.mark.parametrize("own_layer", [False, True])
def test_the_clip_is_the_same_in_both_forms(own_layer: bool) -> None:
    found = []
    for kind in (Dense, LowRank, None):
        model = dense_chain([3, 5, 4, 3])
        x = input_for(model, 4)
        _, function, _ = cross_entropy(x, 3)
        clip = None if kind is None else 1e-3
        inner = (kind or LowRank)(own_layer=own_layer, clip=clip)
        for _ in range(2):
            step(DDPNOpt(model, lr=LR, value=Augmented(inner)), model, x, function)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])
    assert float((found[0] - found[2]).norm()) > 1e-6


@pytest.mark.parametrize("statistics", ["plain", "value"])
def test_the_inner_forms_options_are_the_values_own(statistics: str) -> None:
    value = Augmented(LowRank(rank=2, statistics=statistics))
    assert (value.statistics, value.rank, value.linearization) == (statistics, 2, "factor")


def test_accumulated_passes_are_one_batch() -> None:
    model, twin = dense_chain([3, 5, 4, 3]), dense_chain([3, 5, 4, 3])
    x = input_for(model, 6)
    y, _, _ = cross_entropy(x, 3)
    for m, parts in ((model, [slice(0, 6)]), (twin, [slice(0, 3), slice(3, 6)])):
        opt = VanillaDDP(m, lr=LR)
        for part in parts:
            (F.cross_entropy(m(x[part]), y[part]) / len(parts)).backward()
        opt.step()
        assert opt.alpha == 1.0
    assert_same(model, twin, 1e-11)


# Line search -------------------------------------------------------------------------------------


def test_the_feedforward_is_halved_until_the_loss_falls() -> None:
    model = dense_chain([3, 5, 4, 3])
    x = input_for(model, 4)
    _, function, hessian = cross_entropy(x, 3)
    opt = VanillaDDP(model, lr=100.0, dynamics="second_order")
    seen = set()
    for _ in range(6):
        reference = FullQ(copy.deepcopy(model), 100.0, second=True, joint=True, own_layer=True)
        before = float(function(model(x)).detach())
        step(opt, model, x, function)
        after = float(function(model(x)).detach())
        assert after < before if opt.alpha else after == before
        seen.add(opt.alpha)
        assert opt.last_step is not None
        assert len(opt.last_step.layers) == (3 if opt.alpha else 0)  # of the accepted trial alone
        if opt.alpha:
            reference.sweep(x, function, hessian)
            assert_params(model, reference.rollout(x, opt.alpha), 1e-6)
    assert seen - {1.0}


def test_a_rejected_step_changes_nothing() -> None:
    model = dense_chain([3, 5, 3])
    x = input_for(model, 4)
    _, function, _ = cross_entropy(x, 3)
    opt = VanillaDDP(model, halvings=0)
    opt._search.sufficient = 1e9  # asks for more than any step can give
    before = copy.deepcopy(model)
    step(opt, model, x, function)
    assert opt.alpha == 0.0 and opt.rejected == 1
    assert_same(model, before)


def test_the_closure_is_evaluated_where_the_cost_is_not_known() -> None:
    calls = 0
    model, twin = dense_chain([3, 5, 3]), dense_chain([3, 5, 3])
    x = input_for(model, 4)
    y = torch.randn(4, 3).double()

    def factor(z: Tensor) -> Tensor:
        return (2 / z.numel()) ** 0.5 * torch.eye(3).double().expand(len(z), 3, 3)

    opt = VanillaDDP(model, lr=50.0, terminal=factor)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    known = VanillaDDP(twin, lr=50.0, terminal="mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DDPNOptWarning)
        for _ in range(3):
            opt.step(closure)  # type: ignore[arg-type]
            step(known, twin, x, lambda z: F.mse_loss(z, y))
            assert opt.alpha == known.alpha
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
            assert opt.last_step is not None
            assert [layer.name for layer in opt.last_step.layers] == ["layers.0", "layers.1"]
    assert calls >= 9  # the standard call, the loss as it is, and every trial
    assert_same(model, twin, 1e-10)


@pytest.mark.parametrize("clearing", ["in place", "never"])
def test_a_closure_that_keeps_its_gradients(clearing: str) -> None:
    """What evaluations add to .grad is not what the step is taken on."""
    model, twin = dense_chain([3, 5, 3]), dense_chain([3, 5, 3])
    x, y = input_for(model, 4), torch.randn(4, 3).double()

    def factor(z: Tensor) -> Tensor:
        return (2 / z.numel()) ** 0.5 * torch.eye(3).double().expand(len(z), 3, 3)

    opt = VanillaDDP(model, lr=1e3, terminal=factor, dynamics="second_order")
    other = VanillaDDP(twin, lr=1e3, terminal="mse", dynamics="second_order")

    def closure() -> Tensor:
        if clearing == "in place":
            opt.zero_grad(set_to_none=False)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)  # type: ignore[arg-type]
    step(other, twin, x, lambda z: F.mse_loss(z, y))
    assert opt.alpha == other.alpha > 0
    assert_same(model, twin, 1e-9)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_the_search_sees_the_loss_behind_a_frozen_layer(frozen: int) -> None:
    model = dense_chain([3, 5, 4, 3])
    model.layers[frozen].requires_grad_(False)
    x = input_for(model, 6)
    _, function, _ = cross_entropy(x, 3)
    opt = VanillaDDP(model, lr=1e4)
    for _ in range(4):
        before = float(function(model(x)).detach())
        step(opt, model, x, function)
        after = float(function(model(x)).detach())
        assert after < before if opt.alpha else after == before


@pytest.mark.parametrize("dynamics", ["first_order", "second_order"])
def test_half_precision(dynamics: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
    x, y = torch.randn(6, 3).bfloat16(), torch.tensor([0, 1, 2, 0, 1, 2])
    opt = VanillaDDP(model, dynamics=dynamics, terminal="cross_entropy")
    before = copy.deepcopy(model)
    step(opt, model, x, lambda z: F.cross_entropy(z, y))
    assert not torch.equal(before[0].weight, model[0].weight)


def test_evaluating_the_closure_leaves_buffers_and_generators() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(x, 0.1, self.training)

    model = nn.Sequential(nn.Linear(3, 5), Counted(), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    opt = VanillaDDP(model, terminal=lambda z: torch.eye(3).double().expand(len(z), 3, 3) / 2)
    states = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        states.append(torch.get_rng_state())
        return loss

    opt.step(closure)  # type: ignore[arg-type]
    assert len(states) > 2 and float(model[1].calls) == 1
    assert torch.equal(torch.get_rng_state(), states[0])


def test_without_either_it_says_so_once() -> None:
    model = dense_chain([3, 5, 3])
    x, y = input_for(model, 4), torch.randn(4, 3).double()
    opt = VanillaDDP(model, terminal=lambda z: torch.eye(3).double().expand(len(z), 3, 3) / 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(opt, model, x, lambda z: F.mse_loss(z, y))
    said = [w for w in caught if "line search" in str(w.message)]
    assert len(said) == 1 and opt.alpha == 1.0


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_too_large_a_problem_is_refused_with_its_bytes(form: str) -> None:
    model = dense_chain([3, 5, 3])
    x = input_for(model, 4)
    _, function, _ = cross_entropy(x, 3)
    opt = VanillaDDP(model, form=form, memory=1000)
    before = copy.deepcopy(model)
    with pytest.raises(MemoryError, match=r"needs about [\d,]+ bytes.*1,000 may be used"):
        step(opt, model, x, function)
    assert_same(model, before)


def test_the_bytes_grow_with_the_square_of_the_batch() -> None:
    def bytes_for(batch: int) -> int:
        model = dense_chain([16, 16, 3])
        x = input_for(model, batch)
        _, function, _ = cross_entropy(x, 3)
        with pytest.raises(MemoryError) as error:
            step(VanillaDDP(model, form="dense", memory=1), model, x, function)
        return int(str(error.value).split("about ")[1].split(" bytes")[0].replace(",", ""))

    assert bytes_for(64) / bytes_for(32) == pytest.approx(4, rel=0.2)


def test_a_loss_that_was_recognised_stays_known() -> None:
    """Where logits are large, rounding hides the form of the gradient."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = VanillaDDP(model)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    step(opt, model, x, lambda z: F.cross_entropy(z, y))
    for scale in (10.0, 100.0, 1000.0):
        before = copy.deepcopy(model)
        step(opt, model, scale * x, lambda z: F.cross_entropy(z, y))
        assert opt.last_step is not None and opt.last_step.terminal == "cross_entropy"
        assert opt.alpha == 0 or not torch.equal(before.weight, model.weight)


def test_what_it_can_not_do_is_refused_by_name() -> None:
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="'0.weight' is not in a layer"):
        step(VanillaDDP(model), model, x, lambda z: F.cross_entropy(z, y))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(TerminalError, match="name it with terminal="):
        step(VanillaDDP(model), model, x, lambda z: z.square().sum())


def test_an_empty_batch_moves_nothing() -> None:
    model = dense_chain([3, 4, 3])
    before, x = copy.deepcopy(model), torch.randn(5, 3, dtype=torch.float64)
    y, opt = torch.tensor([0, 1, 2, 0, 1]), VanillaDDP(model)
    step(opt, model, x[:0], lambda z: F.cross_entropy(z, y[:0]))
    assert_same(model, before, 0.0)
    step(opt, model, x, lambda z: F.cross_entropy(z, y))
    twin = copy.deepcopy(before)
    step(VanillaDDP(twin), twin, x, lambda z: F.cross_entropy(z, y))
    assert_same(model, twin, 0.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"Q_uu": "some"}, "Q_uu"),
        ({"form": "sparse"}, "form"),
        ({"form": "low_rank", "regularization": 0.1}, "form='low_rank'"),
        ({"form": "low_rank", "dynamics": "second_order"}, "form='low_rank'"),
        ({"dynamics": "third"}, "dynamics"),
        ({"halvings": -1}, "halvings"),
        ({"memory": 0}, "memory"),
        ({"regularization": -1.0}, "regularization"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VanillaDDP(nn.Linear(3, 2), **options)


def test_it_trains_wine() -> None:
    data = load_wine()
    x = torch.tensor(data.data).float()
    x, y = (x - x.mean(0)) / x.std(0), torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(13, 10), nn.Tanh(), nn.Linear(10, 3))
    opt = VanillaDDP(model)
    for _ in range(3):
        for part in torch.randperm(len(x)).split(16):
            step(opt, model, x[part], lambda z, part=part: F.cross_entropy(z, y[part]))
    assert float((model(x).argmax(1) == y).float().mean()) > 0.97
    assert opt.rejected <= 2
