# SPDX-License-Identifier: MIT
"""The Max-Mahalanobis center loss: its centers, its gradient, and as a terminal cost."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt import MMC, MSE, DDPNOpt, MMCLoss
from ddpnopt.value import Dense, LowRank
from oracles.common import assert_same, dense_chain, distance, input_for, train

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

VALUES = ("moreau", "gauss_newton", "low_rank", "dense")


def problem(batch: int = 7, dim: int = 5) -> tuple[nn.Module, Tensor, Tensor, MMCLoss]:
    """A chain in float64, a batch, labels of four classes and the loss."""
    chain = dense_chain([3, 6, 4, dim])
    y = torch.arange(batch) % 4
    return chain, input_for(chain, batch), y, MMCLoss(4, dim, norm=2.0).double()


# The loss ---------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(0, 10), st.floats(0.1, 100.0))
def test_centers_are_a_regular_simplex(num_classes: int, extra: int, norm: float) -> None:
    dim = num_classes - 1 + extra
    centers = MMCLoss(num_classes, dim, norm).centers.double()
    assert centers.shape == (num_classes, dim)
    products = centers @ centers.T / norm**2
    expected = torch.full_like(products, -1 / (num_classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(products, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(centers.sum(0), torch.zeros(dim).double(), rtol=0, atol=1e-5 * norm)
    assert not centers[:, num_classes - 1 :].any()


def test_centers_of_two_classes() -> None:
    assert MMCLoss(2, 1).centers.flatten().tolist() == pytest.approx([10.0, -10.0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient(reduction: str) -> None:
    loss = MMCLoss(4, 5, norm=3.0, reduction=reduction).double()
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 0, 3])
    rows = [
        0.5 * sum((a - b) ** 2 for a, b in zip(z[i], loss.centers[y[i]], strict=True))
        for i in range(6)
    ]
    factor = 1 / 6 if reduction == "mean" else 1.0
    value = loss(z, y)
    torch.testing.assert_close(value, factor * sum(rows))
    value.backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, factor * (z.detach() - loss.centers[y]))
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)


def test_predict_is_the_nearest_center() -> None:
    loss = MMCLoss(6, 7)
    assert loss.predict(loss.centers).tolist() == list(range(6))
    z = 20 * torch.randn(50, 7)
    assert torch.equal(loss.predict(z), torch.cdist(z, loss.centers).argmin(1))
    assert loss.predict(z.double()).equal(loss.predict(z))
    assert loss.predict(z.bfloat16()).shape == (50,)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_classes": 1, "dim": 3}, "num_classes=1"),
        ({"num_classes": 5, "dim": 3}, "dim=3.*num_classes - 1 = 4"),
        ({"num_classes": 3, "dim": 3, "norm": 0.0}, "norm=0.0"),
        ({"num_classes": 3, "dim": 3, "norm": math.nan}, "norm=nan"),
        ({"num_classes": 3, "dim": 3, "reduction": "none"}, "reduction='none'.*mean, sum"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MMCLoss(**options)


@pytest.mark.parametrize(
    ("z", "y", "named"),
    [
        (torch.zeros(4, 3), torch.zeros(4).long(), r"\(4, 3\).*dim=5"),
        (torch.zeros(5), torch.zeros(5).long(), r"\(5,\)"),
        (torch.zeros(4, 5), torch.zeros(3).long(), r"\(3,\)"),
        (torch.zeros(4, 5), torch.zeros(4, 1).long(), r"\(4, 1\)"),
        (torch.zeros(4, 5), torch.zeros(4), "float32"),
        (torch.zeros(4, 5), torch.tensor([0, 1, 2, 4]), "0 to 4.*num_classes - 1 = 3"),
        (torch.zeros(4, 5), torch.tensor([0, -1, 2, 3]), "-1 to 3"),
    ],
)
def test_bad_batches(z: Tensor, y: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MMCLoss(4, 5)(z, y)


def test_predict_names_a_bad_shape() -> None:
    with pytest.raises(ValueError, match="dim=5"):
        MMCLoss(4, 5).predict(torch.zeros(2, 4))


def test_it_moves_and_is_saved_as_a_module() -> None:
    loss = MMCLoss(4, 5, norm=3.0)
    assert not list(loss.parameters())
    assert loss.double().centers.dtype == torch.float64
    assert copy.deepcopy(loss).to("meta").centers.device.type == "meta"
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = MMCLoss(4, 5, norm=1.0).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.centers, loss.centers)
    assert "num_classes=4, dim=5, norm=3.0" in repr(loss)


def test_half_precision_outputs_lose_no_digits_in_the_loss() -> None:
    loss, y = MMCLoss(4, 5), torch.arange(4)
    z = torch.randn(4, 5).bfloat16()
    assert loss(z, y).dtype == torch.float32
    assert torch.equal(loss(z, y), loss(z.float(), y))


# The terminal cost ------------------------------------------------------------------------------


def run(terminal: object, loss: Callable[[Tensor], Tensor], count: int = 3, **options: Any) -> Any:
    chain, x, _, _ = problem()
    opt = DDPNOpt(chain, terminal=terminal, **{"lr": 0.1, **options})  # type: ignore[arg-type]
    train(chain, opt, [x] * count, loss)
    assert opt.last_step is not None
    return chain, opt.last_step


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("value", VALUES)
def test_every_value_function_trains(value: str, feedback: Any) -> None:
    _, x, y, criterion = problem()
    before = float(criterion(problem()[0](x), y).detach())
    options = {"count": 60, "value": value, "feedback": feedback}
    chain, step = run("mmc", lambda z: criterion(z, y), **options)
    assert step.terminal == "mmc"
    assert float(criterion(chain(x), y).detach()) < 0.5 * before


@pytest.mark.parametrize("backup", ["proximal", "closed_loop", "riccati"])
def test_low_rank_is_dense(backup: str) -> None:
    _, _, y, criterion = problem()
    one, _ = run("mmc", lambda z: criterion(z, y), value=LowRank(backup=backup))
    other, _ = run("mmc", lambda z: criterion(z, y), value=Dense(backup=backup))
    assert_same(one, other, 1e-10)


@pytest.mark.parametrize("value", VALUES)
def test_the_cost_is_the_factor_s(value: str) -> None:
    """phi_xx = I / B: the step equals that of a callable that says so."""
    _, _, y, criterion = problem()

    def factor(z: Tensor) -> Tensor:
        return torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1) / len(z) ** 0.5

    one, _ = run("mmc", lambda z: criterion(z, y), value=value)
    other, _ = run(factor, lambda z: criterion(z, y), value=value)
    assert_same(one, other, 1e-10)


@pytest.mark.parametrize("value", VALUES)
def test_objects_with_a_scale_and_a_reduction(value: str) -> None:
    _, _, y, mean = problem()
    summed = MMCLoss(4, 5, norm=2.0, reduction="sum").double()
    named, _ = run("mmc", lambda z: mean(z, y), value=value)
    for terminal, loss in (
        (MMC(), lambda z: mean(z, y)),
        (MMC(scale=1 / 7, reduction="sum"), lambda z: summed(z, y) / 7),
    ):
        other, step = run(terminal, loss, value=value)
        assert step.terminal == "mmc"
        assert_same(named, other, 1e-12)
    # A loss times 3 at a rate over 3 is the same problem.
    scaled, _ = run(MMC(scale=lambda: 3.0), lambda z: 3 * mean(z, y), value=value, lr=0.1 / 3)
    assert_same(named, scaled, 1e-10)
    wrong, _ = run(MMC(scale=3.0), lambda z: mean(z, y), value=value)
    assert distance(named, wrong) > 1e-4


def test_accumulation_with_a_scale_is_the_whole_batch() -> None:
    _, _, y, criterion = problem(8)
    models = []
    for parts in (1, 2):
        chain, x, _, _ = problem(8)
        opt = DDPNOpt(chain, lr=0.1, value="dense", terminal=MMC(scale=1 / parts))
        for part in torch.arange(8).chunk(parts):
            (criterion(chain(x[part]), y[part]) / parts).backward()
        opt.step()
        models.append(chain)
    assert_same(*models, 1e-12)


def test_one_linear_layer_by_hand() -> None:
    """M = I, h = W x: d = sum_i (1 + lr |x_i|^2 / B)^-1 g_i x_i^T with V_hh = I / B."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 5, bias=False).double()
    W = layer.weight.detach().clone()
    _, x, y, criterion = problem()
    opt = DDPNOpt(layer, lr=0.3, value=Dense(own_layer=True), terminal="mmc")
    criterion(layer(x), y).backward()
    opt.step()
    G = (x @ W.T - criterion.centers[y]) / len(x)
    shrunk = G / (1 + 0.3 * x.square().sum(1, keepdim=True) / len(x))
    torch.testing.assert_close(layer.weight.detach(), W - 0.3 * shrunk.T @ x, rtol=0, atol=1e-14)


def test_a_plain_linear_layer_takes_sgds_step() -> None:
    """Without its own curvature in Q_uu a single layer's policy is the gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 5, bias=False).double()
    twin = copy.deepcopy(layer)
    _, x, y, criterion = problem()
    for model, opt in (
        (layer, DDPNOpt(layer, lr=0.3, value="dense", terminal="mmc")),
        (twin, torch.optim.SGD(twin.parameters(), 0.3)),
    ):
        criterion(model(x), y).backward()
        opt.step()
    assert_same(layer, twin, 1e-14)


@pytest.mark.parametrize("kind", [MSE, MMC])
def test_unknown_reductions_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.*'batch'.*mean, sum"):
        kind(reduction="batch")


@pytest.mark.parametrize("kind", [MSE, MMC])
def test_the_object_is_its_own_factor(kind: type) -> None:
    z = torch.randn(6, 5, dtype=torch.float64)
    for reduction in ("mean", "sum"):
        S = kind(0.5, reduction)(z)
        assert S.shape == (6, 5, 5) and S.dtype == z.dtype
        unit = {MSE: 2 / 30 if reduction == "mean" else 2.0, MMC: 1 / 6}[kind]
        unit = 1.0 if kind is MMC and reduction == "sum" else unit
        expected = 0.5 * unit * torch.eye(5, dtype=z.dtype).expand(6, -1, -1)
        torch.testing.assert_close(S @ S.mT, expected)
