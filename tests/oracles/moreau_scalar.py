# SPDX-License-Identifier: MIT
"""The Moreau policy as an independent scalar dynamic programme, its line models and their flow.

The predicted change of the loss, q, is the state; each layer k chooses a scalar a_k at cost
a_k^2 / (2 s_k); the terminal cost is the line model l(delta). ``nested_policy`` solves Bellman's
equation by nested minimisation. ``flow_coefficient`` integrates the gradient flow of l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mpmath
import numpy as np
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit


@dataclass(frozen=True)
class LineModel:
    """The loss along its gradient: logistic, or quadratic where ``excess`` is None.

    Attributes:
        kappa: l''(0).
        excess: Lambda - 1.
    """

    kappa: float
    excess: float | None

    @property
    def omega(self) -> float:
        """Steepness of the logistic slope."""
        assert self.excess is not None
        slope = 1.0 + self.excess
        return slope if self.excess < 1e-4 else self.kappa * slope / self.excess

    def slope(self, delta: float) -> float:
        """l'(delta)."""
        if self.excess is None:
            return 1.0 + self.kappa * delta
        with mpmath.workdps(40):
            a = mpmath.mpf(self.omega) * delta - mpmath.log(max(self.excess, 1e-6))
            return float((1 + mpmath.mpf(self.excess)) / (1 + mpmath.exp(-a)))

    def inverse_slope(self, height: float) -> float:
        """The delta with l'(delta) = height; logistic only."""
        assert self.excess is not None
        with mpmath.workdps(40):
            part = mpmath.mpf(height) / (1 + mpmath.mpf(self.excess))
            v = mpmath.log(part / (1 - part))
            return float((v + mpmath.log(max(self.excess, 1e-6))) / mpmath.mpf(self.omega))

    def value(self, delta: float) -> float:
        """l(delta) with l(0) = 0 subtracted nowhere: constants do not matter."""
        if self.excess is None:
            return delta + 0.5 * self.kappa * delta**2
        a = self.omega * delta - math.log(max(self.excess, 1e-6))
        return (1.0 + self.excess) / self.omega * float(np.logaddexp(0.0, a))


def softmax_line(logits: np.ndarray, target: np.ndarray) -> LineModel:
    """Line model of cross-entropy for one sample with a target distribution."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    g = p - target
    norm2, mean = float(g @ g), float(p @ g)
    return LineModel(float(p @ (g - mean) ** 2) / norm2**2, float(g.max() - mean) / norm2)


@st.composite
def line_models(draw: st.DrawFn) -> LineModel:
    """The line model of random logits, from hopeless to nearly certain."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    classes, scale = draw(st.integers(2, 10)), draw(st.sampled_from([0.1, 1.0, 4.0]))
    logits = scale * generator.normal(size=classes)
    return softmax_line(logits, np.eye(classes)[draw(st.integers(0, classes - 1))])


def logistic_line(logits: np.ndarray, target: np.ndarray, scale: float = 1.0) -> LineModel:
    """Line model of binary cross-entropy with logits: the outputs' sum times scale."""
    p = 1 / (1 + np.exp(-logits))
    g = scale * (p - target)
    norm2 = float(g @ g)
    lam = float(scale * np.abs(g).sum() / norm2)
    return LineModel(float(scale * (p * (1 - p)) @ g**2) / norm2**2, lam - 1.0)


def quadratic_line(factor: np.ndarray, g: np.ndarray) -> LineModel:
    """l' = 1 + kappa delta with kappa = |S^T g|^2 / |g|^4."""
    return LineModel(float(((factor.T @ g) ** 2).sum() / (g @ g) ** 2), None)


def nested_policy(line: LineModel, s: list[float], q: float) -> float:
    """coef = V_t'(q) by nested scalar minimisation over the layers' controls, deepest first.

    V_T = l, V_k(q) = min_a { a^2 / (2 s_k) + V_{k+1}(q - a) }; by the envelope theorem
    V_k'(q) = a* / s_k.
    """

    def stage(k: int, q: float) -> tuple[float, float]:
        if k == len(s):
            return line.value(q), 0.0

        def cost(a: float) -> float:
            return a * a / (2 * s[k]) + stage(k + 1, q - a)[0]

        # The slope is between 0 and the bound, so the control is, too: a bracket that holds it.
        found = minimize_scalar(cost, bracket=(0.0, s[k]), options={"xtol": 1e-11})
        return float(found.fun), float(found.x)

    return stage(0, q)[1] / s[0]


def joint_policy(line: LineModel, s: list[float], q: float) -> float:
    """The same coefficient by one joint minimisation over all controls (for many layers)."""
    steps = np.asarray(s)

    def cost(b: np.ndarray) -> tuple[float, np.ndarray]:  # a = sqrt(s) b: well scaled
        a = np.sqrt(steps) * b
        delta = q - a.sum()
        return 0.5 * float(b @ b) + line.value(delta), b - np.sqrt(steps) * line.slope(delta)

    found = minimize(cost, np.zeros(len(s)), jac=True, method="BFGS", options={"gtol": 1e-12})
    return float(found.x[0] / np.sqrt(steps[0]))


def implicit_coefficient(line: LineModel, total: float, q: float) -> float:
    """coef = l'(delta*), delta* = q - S l'(delta*), by bisection in 40 digits."""
    if line.excess is None:
        return (1 + line.kappa * q) / (1 + line.kappa * total)
    with mpmath.workdps(40):
        lam, omega = 1 + mpmath.mpf(line.excess), mpmath.mpf(line.omega)
        shift = mpmath.log(max(line.excess, 1e-6))
        low, high = q - total * lam, mpmath.mpf(q)
        for _ in range(200):
            mid = (low + high) / 2
            value = mid - q + total * lam / (1 + mpmath.exp(shift - omega * mid))
            low, high = (mid, high) if value < 0 else (low, mid)
        return float(lam / (1 + mpmath.exp(shift - omega * low)))


def flow_coefficient(line: LineModel, total: float, q: float) -> float:
    """(q - delta(S)) / S of delta' = -l'(delta), delta(0) = q, by an integrator of order 8.

    Integrated is the average itself, y = (q - delta) / S over the time tau / S: nothing cancels.
    """
    assert line.excess is not None
    bound, omega = 1.0 + line.excess, line.omega
    shift = math.log(max(line.excess, 1e-6))

    def slope(_: float, y: np.ndarray) -> np.ndarray:
        return bound * expit(omega * (q - total * y) - shift)

    found = solve_ivp(slope, (0.0, 1.0), [0.0], method="DOP853", rtol=1e-12, atol=1e-16)
    return float(found.y[0, -1])


def precise_flow(line: LineModel, total: float, q: float) -> float:
    """The same at any size: the time that the flow takes, as an equation, by bisection.

    The inverse slope (1 + exp(shift - omega delta)) / Lambda has the antiderivative below.
    """
    assert line.excess is not None
    with mpmath.workdps(60):
        bound, omega = 1 + mpmath.mpf(line.excess), mpmath.mpf(line.omega)
        start, total = mpmath.mpf(q), mpmath.mpf(total)
        shift = mpmath.log(max(line.excess, 1e-6))

        def time(distance: mpmath.mpf) -> mpmath.mpf:
            tail = mpmath.exp(shift - omega * start) * mpmath.expm1(omega * distance) / omega
            return (distance + tail) / bound

        low, high = mpmath.mpf(0), total * bound / (1 + mpmath.exp(shift - omega * start))
        for _ in range(400):
            middle = (low + high) / 2
            low, high = (middle, high) if time(middle) < total else (low, middle)
        return float(high / total)
