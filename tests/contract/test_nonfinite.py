# SPDX-License-Identifier: MIT
"""Values that are not finite, and the record of the last step."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import NonFiniteError, UnsupportedModelError
from ddpnopt.value import LowRank, Moreau
from ddpnopt.value.backups import dense_backup
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


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_a_backup_without_solution(
    feedback: Any, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside the backward pass it is found, kept, and raised at the step."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(5) if norm else nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 5), middle, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    twin = copy.deepcopy(model)
    opt = DDPNOpt(model, lr=0.1, value="dense", feedback=feedback)
    skip = DDPNOpt(twin, lr=0.1, value="dense", feedback=feedback, nonfinite="skip")
    before = copy.deepcopy(model.state_dict())

    def singular(*_: Any) -> Tensor:
        raise torch.linalg.LinAlgError("singular")  # type: ignore[attr-defined]

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "solve", singular)
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(NonFiniteError, match="no solution in this dtype"):
            opt.step()
        F.cross_entropy(twin(x), y).backward()
        skip.step()
    assert skip.skipped == 1
    opt.zero_grad()
    weights = dict(model.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in weights.items())
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert any(not torch.equal(before[name], p) for name, p in weights.items())


def test_a_singular_matrix_is_no_backup() -> None:
    eye = torch.eye(3)[None]
    with pytest.raises(NonFiniteError, match="no solution"):
        dense_backup("proximal", torch.ones(1, 3), -eye, eye)


@pytest.mark.parametrize("curvature", ["rmsprop", "adamw"])
@pytest.mark.parametrize("feedback", [True, False])
def test_statistics_that_overflow(curvature: str, feedback: bool) -> None:
    """Squares from 1e20 on are infinite in float32; the weights themselves would stay finite."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    opt = DDPNOpt(model, lr=0.1, curvature=curvature, feedback=feedback)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    F.cross_entropy(model(x), y).backward()
    opt.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[0].bias.grad.mul_(1e25)
    with pytest.raises(NonFiniteError, match=r"statistics of '0\.bias'|weights of '0\.weight'"):
        opt.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    after = opt.state_dict()["state"]
    for k, entries in state.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[k][name])), name


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("curvature", ["identity", "adamw"])
def test_a_state_that_is_not_finite_already_is_named(curvature: str, feedback: object) -> None:
    """Neither a lower rate nor skipping would help: another state does."""
    model = mlp()
    momentum = 0.9 if curvature == "identity" else 0.0
    opt = DDPNOpt(model, lr=0.01, momentum=momentum, curvature=curvature, feedback=feedback)
    iterate(model, opt, [0])
    entry = "momentum_buffer" if momentum else "exp_avg"
    opt.state[model[2].weight][entry][-1, -1] = torch.nan
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=rf"state of '2\.weight' is not finite .*{entry}"):
        iterate(model, opt, [1])
    assert_unchanged(model, before)
    opt.state[model[2].weight].clear()  # as the message says
    iterate(model, opt, [1])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"curvature": "adamw"}, "curvature='adamw'"),
        ({"curvature": "rmsprop"}, "curvature='rmsprop'"),
        ({"weight_decay": 0.1}, "weight_decay"),
    ],
)
def test_sparse_gradients_are_refused_by_name(options: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    words, y = torch.randint(9, (5, 3)), torch.randint(3, (5,))
    opt = DDPNOpt(model, lr=0.1, **options)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.cross_entropy(model(words), y).backward()
        with pytest.raises(UnsupportedModelError, match=rf"'0\.weight'.*{reason}"):
            opt.step()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        opt.detach()
        own = {"params": [model[0].weight], "curvature": "identity", "weight_decay": 0.0}
        others = {"params": list(model[2].parameters())}
        opt = DDPNOpt(model, lr=0.1, params=[own, others], **options)
        opt.zero_grad()
        F.cross_entropy(model(words), y).backward()
        opt.step()
    assert all(not torch.equal(before[k], v) for k, v in model.state_dict().items())
