# SPDX-License-Identifier: MIT
"""AdamW against torch, KFAC and EKFAC against dense Kronecker products in float64."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import EKFAC, KFAC, DDPNOpt, NonFiniteError, curvature
from ddpnopt.curvature.factorisation import eigenvectors, inverse
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import Moreau
from oracles.common import assert_same, snapshot
from oracles.kronecker import Dense, data, net, train

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
NAMES = ("adamw", "kfac", "ekfac")


# AdamW ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adamw_is_torchs(weight_decay: float, betas: tuple[float, float]) -> None:
    model, twin = net(), net()
    opt = DDPNOpt(
        model,
        lr=0.01,
        curvature=curvature.AdamW(betas=betas),
        weight_decay=weight_decay,
        feedback=False,
    )
    other = torch.optim.AdamW(twin.parameters(), 0.01, betas, weight_decay=weight_decay)
    train(model, opt, data(50))
    train(twin, other, data(50))
    assert_same(model, twin, 1e-14)


def test_adamw_with_coefficients_of_one_is_torchs() -> None:
    model, twin = net(), net()
    opt = DDPNOpt(model, lr=0.01, curvature="adamw", value=Moreau(strength=0.0, line="quadratic"))
    for x, y in data(10):  # strength 0: S = 0; q is what is left, so compare the first layer
        before = copy.deepcopy(model)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        del before
    assert opt.last_step is not None and opt.last_step.layers[0].S_mean == 0.0
    opt = DDPNOpt(
        twin, lr=0.01, curvature="adamw", value=Moreau(strength=0.0), feedback="open_loop"
    )
    reference = net()
    train(twin, opt, data(20))
    train(reference, torch.optim.AdamW(reference.parameters(), 0.01, weight_decay=0), data(20))
    assert_same(twin, reference, 1e-13)


def test_adamw_has_its_own_momentum() -> None:
    with pytest.raises(ValueError, match="momentum=0.9.*adamw"):
        DDPNOpt(net(), curvature="adamw", momentum=0.9)
    opt = DDPNOpt(net(), momentum=0.9)
    with pytest.raises(ValueError, match="adamw"):
        DDPNOpt(
            opt.model,
            params=[{"params": opt.model.parameters(), "curvature": "adamw", "momentum": 0.5}],
        )
    assert opt.param_groups[0]["weight_decay"] == 0


def test_adamw_feeds_v_with_the_larger_gradient() -> None:
    """P = eta / (sqrt(v^) + eps) with this step's gradient; v is then fed with max(g^2, d^2)."""
    model = net()
    opt = DDPNOpt(model, lr=0.05, curvature="adamw", feedback="open_loop")
    for step, (x, y) in enumerate(data(3), start=1):
        twin = copy.deepcopy(model)
        before = {
            p: opt.state[p].get("exp_avg_sq", torch.zeros_like(p)).clone()
            for p in model.parameters()
        }
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        d = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        F.cross_entropy(twin(x), y).backward()
        opt.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert q.grad is not None
            larger = torch.maximum(d[p].square(), q.grad.square())
            expected = 0.999 * before[p] + 0.001 * larger
            torch.testing.assert_close(opt.state[p]["exp_avg_sq"], expected, rtol=1e-10, atol=1e-18)
            assert opt.state[p]["step"] == step


# Kronecker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"update_every": 3},
        {"damping": 0.003, "update_every": 1},
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_kronecker_equals_dense(eigen: bool, options: dict[str, Any], bias: bool) -> None:
    model, twin = net(bias), net(bias)
    opt = (EKFAC if eigen else KFAC)(model, lr=0.02, **{"damping": 0.1, **options})
    reference = Dense(twin, eigen, 0.02, **options)
    for x, y in data(8):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        reference.step(x, y)
    assert_same(model, twin, 1e-9)


def test_one_sample_is_the_exact_block() -> None:
    model = net()
    opt = EKFAC(model, lr=0.0, damping=0.2)
    (x, y) = data(1, rows=1)[0]
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    train(model, opt, [(x, y)])
    for layer, other in zip(model, twin, strict=True):
        if not isinstance(layer, nn.Linear) or not isinstance(other, nn.Linear):
            continue
        assert other.weight.grad is not None and other.bias.grad is not None
        v = torch.cat([other.weight.grad, other.bias.grad[:, None]], 1).reshape(-1)
        state = opt.state[layer.weight]
        A, G, T = state["A"][0], state["G"][0], torch.kron(state["T_G"][0], state["T_A"][0])
        torch.testing.assert_close(torch.kron(G, A), torch.outer(v, v))
        M = T.T @ torch.diag(state["scale"][0].reshape(-1) + 0.2) @ T
        torch.testing.assert_close(M, torch.outer(v, v) + 0.2 * torch.eye(len(v), dtype=v.dtype))


def test_linear_net_is_the_exact_block() -> None:
    """Gradients at h that do not depend on the sample: E[x x^T] (x) g g^T is E[(g x^T)(..)^T]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    opt = KFAC(model, lr=0.0)
    x, c = torch.randn(12, 5).double(), torch.randn(3).double()
    (model(x) @ c).mean().backward()
    opt.step()
    u = torch.cat([x, torch.ones(12, 1).double()], 1)
    g = model[1].weight.T @ c  # type: ignore[operator]
    each = torch.einsum("o,bi->boi", g, u).reshape(12, -1)
    state = opt.state[model[0].weight]  # type: ignore[index]
    torch.testing.assert_close(torch.kron(state["G"][0], state["A"][0]), each.T @ each / 12)


class Varied(nn.Module):
    """What other implementations fail on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.token = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(self.conv(x)).flatten(2).transpose(1, 2)  # (B, T, d)
        h = self.norm(F.relu_(self.token(h)))
        return self.head(h.mean(1))


@pytest.mark.parametrize("feedback", [False, "open_loop", True])
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_where_others_fail(name: str, feedback: Any) -> None:
    """In-place activations, groups and dilation, (B, T, d), checkpoints loaded safely."""
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(12, 4, 5, 5, generator=g).double(), torch.randint(4, (12,), generator=g)
    model = Varied()
    opt = DDPNOpt(model, lr=0.1, curvature=name, feedback=feedback)
    first = float(F.cross_entropy(model(x), y))
    train(model, opt, [(x, y)] * 30)
    assert float(F.cross_entropy(model(x), y)) < first / 2
    saved = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    twin = Varied()
    other = DDPNOpt(twin, lr=0.7, curvature=name, feedback=feedback)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, [(x, y)] * 7)
    assert_same(model, twin)


@pytest.mark.parametrize("eigen", [False, True])
def test_norms_take_the_diagonal_fisher(eigen: bool) -> None:
    x, y = torch.randn(12, 4, 5, 5).double(), torch.randint(4, (12,))
    model = Varied()
    twin = copy.deepcopy(model)
    opt = (EKFAC if eigen else KFAC)(model, lr=0.1, damping=0.3)
    train(model, opt, [(x, y)])
    grads = []
    for i in range(12):
        twin.zero_grad()
        F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
        grads.append(twin.norm.weight.grad.clone())  # type: ignore[union-attr]
    each = torch.stack(grads)
    expected = twin.norm.weight - 0.1 * each.mean(0) / (each.square().mean(0) + 0.3)
    torch.testing.assert_close(model.norm.weight, expected)


def test_accumulation_is_the_whole_batch() -> None:
    model, twin = net(), net()
    a, b = KFAC(model), KFAC(twin)
    for x, y in data(5):
        a.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        a.step()
        train(twin, b, [(x, y)])
    assert_same(model, twin, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_equals_dense(name: str) -> None:
    model, twin = net(), net()
    train(model, DDPNOpt(model, lr=0.05, curvature=name, value="low_rank"), data(5))
    train(twin, DDPNOpt(twin, lr=0.05, curvature=name, value="dense"), data(5))
    assert_same(model, twin, 1e-10)


@pytest.mark.parametrize("strength", [None, 0.25, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_S_of_the_last_layer_by_dense_algebra(name: str, strength: float | None) -> None:
    """S_i = c rho eta g_u^T M^-1 g_u (of the plain loss) with the M of this step.

    Without a number c is 1, and 1/2 for AdamW.
    """
    model = net()
    x, y = data(1)[0]
    twin = copy.deepcopy(model)
    value = Moreau(strength=strength)
    opt = DDPNOpt(model, lr=0.05, curvature=name, value=value, feedback="open_loop")
    train(model, opt, [(x, y)])
    c = (0.5 if name == "adamw" else 1.0) if strength is None else strength
    each = []
    for i in range(16):
        twin.zero_grad()
        F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
        last = twin[4]
        each.append(torch.cat([last.weight.grad, last.bias.grad[:, None]], 1).reshape(-1))  # type: ignore
    g = torch.stack(each)
    gbar = g.mean(0)
    state = opt.state[model[4].weight]  # type: ignore[index]
    if name == "adamw":
        P = torch.diag(0.05 / (gbar.abs() + 1e-8))
    else:
        if name == "kfac":
            P = 0.05 * torch.kron(state["G_inverse"][0], state["A_inverse"][0])
        else:
            T = torch.kron(state["T_G"][0], state["T_A"][0])
            P = 0.05 * T.T @ torch.diag(1 / (state["scale"][0].reshape(-1) + 0.1)) @ T
    s = torch.einsum("bi,ij,bj->b", g, P, g)
    rho = (gbar @ P @ gbar / (s.sum() / 16 / 16)).clamp(1, 16)
    assert opt.last_step is not None
    S = opt.last_step.layers[-1].S
    assert S is not None
    torch.testing.assert_close(S, c * s * rho / 16, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_without_weight_gradients(name: str) -> None:
    model, twin = net(), net()
    value = Moreau(coupling=False)
    train(model, DDPNOpt(model, lr=0.02, curvature=name, value=value), data(6))
    train(
        twin, DDPNOpt(twin, lr=0.02, curvature=name, value=value, weight_gradients=False), data(6)
    )
    assert_same(model, twin, 1e-11)


def test_bias_of_another_group_is_not_joined() -> None:
    model = net()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    opt = DDPNOpt(
        model,
        curvature="kfac",
        feedback=False,
        params=[{"params": weights, "lr": 0.02}, {"params": biases, "lr": 0.01}],
    )
    train(model, opt, data(3))
    assert opt.state[weights[0]]["A"].shape[-1] == 6
    assert "fisher" in opt.state[biases[0]]


# Factorisations ---------------------------------------------------------------------------------


def test_cholesky_falls_back_and_is_counted() -> None:
    A = torch.diag(torch.tensor([1.0, -1e-9, 0.5])).double()[None]
    S, failed = inverse(A)
    assert failed == 1 and bool(S.isfinite().all())
    good = torch.eye(3).double()[None] * 4
    S, failed = inverse(good)
    assert failed == 0
    torch.testing.assert_close(S, good / 16)
    with pytest.raises(NonFiniteError):
        inverse(torch.full((1, 2, 2), float("nan")))


def test_eigh_that_diverges_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.linalg.eigh, []

    def fails_first(A: Tensor) -> Any:
        calls.append(A.dtype)
        if len(calls) % 2:
            raise torch.linalg.LinAlgError("diverged")  # type: ignore[attr-defined]
        return real(A)

    monkeypatch.setattr(torch.linalg, "eigh", fails_first)
    Q, failed = eigenvectors(torch.diag(torch.tensor([3.0, 1.0, 2.0]))[None])
    assert failed == 1 and calls == [torch.float32, torch.float32]
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3)[None])
    model = net().float()
    opt = EKFAC(model)
    batches = [(x.float(), y) for x, y in data(3)]
    with pytest.warns(DDPNOptWarning, match="repeated with more damping"):
        train(model, opt, batches)
    assert opt.fallbacks > 0 and all(bool(p.isfinite().all()) for p in model.parameters())


def test_factors_out_of_range_are_refused() -> None:
    model = net().float()
    opt = KFAC(model)
    before = snapshot(model)
    x = torch.full((4, 6), 1e25)
    with pytest.raises(NonFiniteError, match="'0'|range"):
        train(model, opt, [(x, torch.tensor([0, 1, 2, 3]))])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    skipping = KFAC(model, nonfinite="skip")
    train(model, skipping, [(x, torch.tensor([0, 1, 2, 3]))])
    assert skipping.skipped == 1


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0},
        {"damping": -1.0},
        {"decay": 1.0},
        {"update_every": 0},
        {"statistics_every": 0},
        {"statistics_every": 1.5},
    ],
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        KFAC(net(), **options)
