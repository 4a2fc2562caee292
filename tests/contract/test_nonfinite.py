# SPDX-License-Identifier: MIT
"""Values that are not finite, and the record of the last step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import NonFiniteError, UnsupportedModelError
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_same, assert_unchanged, data, iterate, mlp, snapshot

LR = 0.7
FEEDBACKS = [True, "open_loop", False]


def backward(model: nn.Module, spoil: str) -> None:
    x, y = data()
    if spoil == "input":
        x[0, 0] = torch.nan
    loss = F.cross_entropy(model(x), y)
    if spoil == "loss":
        loss = loss * torch.inf
    loss.backward()
    if spoil == "gradient":
        model[2].weight.grad[1, 1] = torch.nan


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("spoil", ["input", "loss", "gradient"])
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
def test_raise_names_the_layer(feedback: object, spoil: str, curvature: str) -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=0.01, curvature=curvature, feedback=feedback)
    iterate(model, opt, [0])
    opt.zero_grad()
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"'?\b[024]\b'?") as caught:
        backward(model, spoil)
        opt.step()
    if spoil == "gradient":
        assert "2" in str(caught.value)
    assert isinstance(caught.value, FloatingPointError)
    assert_unchanged(model, before)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("spoil", ["input", "loss", "gradient"])
def test_skip_counts_and_skips(feedback: object, spoil: str) -> None:
    model, twin = mlp(), mlp()
    opt = DDPNOpt(model, lr=LR, feedback=feedback, nonfinite="skip")
    other = DDPNOpt(twin, lr=LR, feedback=feedback)
    assert opt.skipped == 0
    iterate(model, opt, [0])
    opt.zero_grad()
    before = snapshot(model)
    backward(model, spoil)
    opt.step()
    assert opt.skipped == 1
    assert_unchanged(model, before)
    iterate(model, opt, [1])
    assert opt.skipped == 1
    iterate(twin, other, [0, 1])
    assert_same(model, twin, 1e-15)


class Explode(nn.Module):
    """Finite at the nominal weights, overflowing after a large step."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 1e9

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x.abs().max() - self.limit) * torch.inf if self.limit < 1e9 else x


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_overflow_in_the_rollout(policy: str) -> None:
    base = mlp()
    blow = Explode()
    model = nn.Sequential(*base[:4], blow, *base[4:])
    opt = DDPNOpt(model, lr=LR, value=LowRank(), nonfinite=policy)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    blow.limit = -1e9  # the second pass overflows
    before = snapshot(model)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"\b(2|4|5|3)\b"):
            opt.step()
    else:
        opt.step()
        assert opt.skipped == 1
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", ["moreau", "low_rank", "gauss_newton"])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_saturated_samples_stay_finite(value: str, feedback: object) -> None:
    """p_y underflows to zero: the gradient is its own column, nothing overflows."""
    if value != "moreau":
        feedback = True
    model = mlp()
    with torch.no_grad():
        model[4].weight.mul_(1e3)
    opt = DDPNOpt(model, lr=1e-3, value=value, feedback=feedback)
    iterate(model, opt, range(4))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert opt.last_step.terminal == "cross_entropy"


@pytest.mark.parametrize("lr", [10.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_absurd_rates_stay_finite(lr: float, dtype: torch.dtype, feedback: object) -> None:
    model = mlp().to(dtype)
    opt = DDPNOpt(model, lr=lr, feedback=feedback, terminal="cross_entropy")
    for seed in range(3):
        x, y = data(seed)
        opt.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        opt.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_last_step() -> None:
    model = mlp()
    opt = DDPNOpt(model, lr=LR)
    opt.diagnose = True
    iterate(model, opt, [0])
    record = opt.last_step
    assert record.terminal == "cross_entropy" and record.depth == "closed_loop"
    assert [layer.name for layer in record.layers] == ["0", "2", "4"]
    for layer in record.layers:
        assert layer.k_norm > 0 and layer.S_mean > 0
        assert 0 < layer.coefficient_mean < 1.5
        assert 0 <= layer.bounded_share <= 1 and layer.coefficient_min <= layer.coefficient_mean
        assert len(layer.coefficient) == len(layer.S) == 6
    assert record.layers[0].feedback_norm == pytest.approx(0, abs=1e-12)
    assert all(layer.feedback_norm > 0 for layer in record.layers[1:])
    assert record.layers[0].S_mean > record.layers[1].S_mean > record.layers[2].S_mean
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.depth = "off"  # type: ignore[misc]
    iterate(model, opt, [1])
    assert opt.last_step is not record


def test_last_step_of_the_other_depths() -> None:
    for feedback in ("open_loop", False):
        model = mlp()
        opt = DDPNOpt(model, lr=LR, feedback=feedback)
        iterate(model, opt, [0])
        assert opt.last_step is not None
        if feedback == "open_loop":
            assert opt.last_step.terminal == "cross_entropy"
            assert all(not layer.feedback_norm for layer in opt.last_step.layers)


def test_last_step_survives_refusal() -> None:
    """A refused step leaves the record of the last good one."""
    model = mlp()
    opt = DDPNOpt(model, lr=LR, value=Moreau())
    iterate(model, opt, [0])
    record = opt.last_step
    x, y = data()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    x.zero_()
    with pytest.raises(UnsupportedModelError):
        opt.step()
    assert opt.last_step is record
