# SPDX-License-Identifier: MIT
"""Every scalar of the rules stays finite and in its bounds; float32 stays close to float64."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, Feedback
from ddpnopt.curvature.factorisation import DAMPINGS, eigenvectors, inverse
from ddpnopt.errors import DDPNOptWarning, NonFiniteError, TerminalError
from ddpnopt.recognition import Recogniser
from ddpnopt.value.backups import scalar_backup
from ddpnopt.value.base import Coupling, mean_field
from ddpnopt.value.line import FLAT, FLOOR, SHORTEST, STIFFEST, Envelope, Flow, Line
from oracles.effort import effort

HALVES = (torch.float16, torch.bfloat16)


# The Moreau rule's scalars -----------------------------------------------------------------------


def decades(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers of any size, and 0."""
    return st.one_of(st.just(0.0), st.floats(low, high).map(lambda e: 10.0**e))


def signed(low: int, high: int) -> st.SearchStrategy[float]:
    return st.tuples(decades(low, high), st.sampled_from([-1.0, 1.0])).map(math.prod)


def bisected(f: Callable[[Any], Any], low: Any, high: Any) -> Any:
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) > 0 else (middle, high)
    return low


def exact(kappa: float, excess: float, S: float, q: float, flow: bool) -> tuple[float, float]:
    """The coefficient to 50 digits from its equation, by bisection; and Lambda."""
    with mpmath.workdps(50):
        Lambda = 1 + mpmath.mpf(excess)
        omega = Lambda if excess < FLAT else mpmath.mpf(kappa) * Lambda / mpmath.mpf(excess)
        c = omega * q - mpmath.log(max(mpmath.mpf(excess), mpmath.mpf(FLOOR)))
        A = min(omega * mpmath.mpf(S) * Lambda, mpmath.mpf(STIFFEST))
        if not flow:
            v = bisected(lambda v: v + A / (1 + mpmath.exp(-v)) - c, c - A - 1, c + 1)
            return float(Lambda / (1 + mpmath.exp(-v))), float(Lambda)
        A, b = max(A, mpmath.mpf(SHORTEST)), mpmath.exp(-c)
        high = min(A, mpmath.log1p(A / b)) if b > 0 else A
        d = bisected(lambda d: d + b * mpmath.expm1(d) - A, mpmath.mpf(0), high)
        return float(Lambda * d / A), float(Lambda)


@settings(max_examples=effort("DDPNOPT_EXAMPLES", 60, 600))
@given(
    kappa=decades(-38, 30),
    excess=decades(-40, 15),
    S=decades(-38, 19),
    q=signed(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(kappa=1.0, excess=1.0, S=0.0, q=1e3, dtype=torch.float64)
def test_coefficients_against_many_digits(
    kappa: float, excess: float, S: float, q: float, dtype: torch.dtype
) -> None:
    """Between 0 and Lambda, and the solution of the equation that defines them."""
    k, e, s, at = (torch.tensor([v], dtype=dtype) for v in (kappa, excess, S, q))
    for rule, flow in ((Envelope, False), (Flow.of, True)):
        found = float(rule(Line(k, e), s)(at))
        wanted, Lambda = exact(float(k), float(e), float(s), float(at), flow)
        assert 0 <= found <= Lambda * (1 + 1e-6)
        assert found == pytest.approx(wanted, rel=1e-6 if dtype == torch.float32 else 1e-11)


def output(gap: float, dtype: torch.dtype, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    z = (torch.randn(4, classes, dtype=torch.float64).clamp(-3, 3) * gap / 6).to(dtype)
    return z.requires_grad_(), torch.randint(0, classes, (4,))


@settings(max_examples=effort("DDPNOPT_EXAMPLES", 60, 600))
@given(
    gap=decades(-30, 4),
    scale=decades(-38, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    loss=st.sampled_from(["cross_entropy", "bce_with_logits", "mse"]),
    auto=st.booleans(),
    classes=st.integers(2, 5),
    seed=st.integers(0, 999),
)
def test_costs_of_saturated_and_of_vanishing_outputs(
    gap: float, scale: float, dtype: torch.dtype, loss: str, auto: bool, classes: int, seed: int
) -> None:
    """Logit gaps to 1e4, gradients down to denormal numbers: finite, or refused by name."""
    z, y = output(gap, dtype, classes, seed)
    hot = F.one_hot(y, classes).to(dtype)
    if loss == "cross_entropy":
        plain = F.cross_entropy(z, y)
    elif loss == "mse":
        plain = F.mse_loss(z, hot)
    else:
        plain = F.binary_cross_entropy_with_logits(z, hot)
    (G,) = torch.autograd.grad(plain * scale, z)
    if not bool(G.isfinite().all()):
        return
    try:
        cost = Recogniser("auto" if auto else loss)(z.detach(), G, -1, 4)
    except TerminalError:
        assert dtype in HALVES  # torch's own gradients are too coarse to be that loss's
        return
    if cost is None:
        return
    assert bool((cost.w > 0).all() and cost.w.isfinite().all())
    assert bool((cost.kappa >= 0).all() and cost.kappa.isfinite().all())
    bound = torch.inf if cost.excess is None else 1 + cost.excess
    rules = [Envelope] if cost.excess is None else [Envelope, Flow.of]
    for rule in rules:
        for S in (0.0, 1e-30, 1.0, 1e19):
            steps = torch.full_like(cost.w, S)
            still = rule(Line(cost.kappa, cost.excess), steps)(None)
            assert bool(((still >= 0) & (still <= 1 + 1e-6)).all())
            for q in (-1e10, 5.0, 1e10):
                moved = rule(Line(cost.kappa, cost.excess), steps)(torch.full_like(cost.w, q))
                assert bool(moved.isfinite().all())
                if cost.excess is not None:
                    assert bool(((moved >= 0) & (moved <= bound * (1 + 1e-6))).all())


@given(st.lists(decades(-38, 18), min_size=1, max_size=6), decades(-38, 18))
def test_coupling_lies_between_one_and_the_batch(squares: list[float], length: float) -> None:
    own = torch.tensor([squares], dtype=torch.float32)
    rho = mean_field([Coupling(length)], own)
    assert bool(((rho >= 1) & (rho <= len(squares))).all())


@given(decades(-30, 15), decades(-30, 15))
def test_proximal_backup_shrinks(beta: float, s: float) -> None:
    one, b, size = torch.ones(1), torch.tensor([beta]), torch.tensor([s])
    alpha, left = scalar_backup("proximal", one, b, size)
    assert bool(((alpha >= 0) & (alpha <= 1)).all() and ((left >= 0) & (left <= b)).all())


# Factorisations ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    n=st.integers(1, 24),
    condition=st.sampled_from([1.0, 1e4, 1e8, 1e16, math.inf]),
    scale=st.sampled_from([1e-20, 1e-8, 1.0, 1e8, 1e20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_factors_of_any_condition(
    n: int, condition: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """Finite and orthogonal always; the inverse where that can be had in the dtype."""
    torch.manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    exponent = 300.0 if condition == math.inf else math.log10(condition)
    spectrum = torch.logspace(0, -exponent, n, dtype=torch.float64)
    A = ((Q * spectrum) @ Q.T * scale).to(dtype)[None]
    A = (A + A.mT) / 2
    S, again = inverse(A)
    E, _ = eigenvectors(A)
    identity = torch.eye(n, dtype=dtype)
    assert bool(S.isfinite().all())
    torch.testing.assert_close(E[0] @ E[0].T, identity, atol=1e-4, rtol=0)
    if condition <= 1e4:
        assert not again
        torch.testing.assert_close(S[0] @ A[0], identity, atol=2e-2, rtol=0)


def test_a_factorisation_is_retried_with_growing_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    A = torch.diag(torch.tensor([4.0, 2.0]))[None]
    seen: list[float] = []

    def never(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(float(matrix[0, 1, 1]) - 2)
        return matrix, torch.ones(1, dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", never)
    S, failed = inverse(A)
    assert failed == 1
    assert seen[0] == 0 and seen == sorted(seen) and len(seen) == 1 + len(DAMPINGS)
    assert seen[-1] == pytest.approx(DAMPINGS[-1] * torch.finfo(A.dtype).eps * 3, rel=1e-2)
    torch.testing.assert_close(S, torch.linalg.inv(A))  # by its eigenvalues
    with pytest.raises(NonFiniteError):
        inverse(A * torch.nan)


def test_failed_factorisations_are_counted_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = DDPNOpt(model, curvature="kfac", terminal="cross_entropy")
    real = torch.linalg.cholesky_ex
    calls = [0]

    def fails_at_first(matrix: Tensor) -> Any:
        calls[0] += 1
        L, info = real(matrix)
        return L, info + calls[0] % 2

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_at_first)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
            opt.step()
    texts = [str(w.message) for w in said if issubclass(w.category, DDPNOptWarning)]
    assert len([text for text in texts if "fallbacks" in text]) == 1
    assert opt.fallbacks == 3 * 2 * 2  # steps, layers, factors
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# float32 beside float64 --------------------------------------------------------------------------

#: Largest distance of the weights over their size, within 200 steps (docs/reliability.md).
DRIFT = {
    "identity": 1e-5,
    "open_loop": 1e-5,
    "low_rank": 1e-5,
    "adamw": 1e-4,
    "feedback": 1e-4,
    "kfac": 1e-4,
}


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "feedback":
        inner = torch.optim.AdamW(model.parameters(), 0.01)
        return Feedback(model, inner, terminal="cross_entropy")
    options: dict[str, Any] = {
        "identity": {"momentum": 0.5},
        "open_loop": {"momentum": 0.5, "feedback": "open_loop"},
        "low_rank": {"value": "low_rank"},
        "adamw": {"curvature": "adamw", "lr": 0.01},
        "kfac": {"curvature": "kfac"},
    }[name]
    return DDPNOpt(model, terminal="cross_entropy", **{"lr": 0.1, **options})


@pytest.mark.parametrize("name", DRIFT)
def test_float32_stays_close_to_float64(name: str) -> None:
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    double = copy.deepcopy(single).double()
    models = (single, optimizer(name, single)), (double, optimizer(name, double))
    teacher = torch.randn(5, 3)
    for _ in range(effort("DDPNOPT_STEPS", 40, 200)):
        x = torch.randn(16, 5)
        y = (x @ teacher).argmax(1)
        for model, opt in models:
            opt.zero_grad()
            F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
            opt.step()
    a, b = (torch.cat([p.detach().flatten().double() for p in m.parameters()]) for m, _ in models)
    assert float((a - b).norm() / b.norm()) < DRIFT[name]
