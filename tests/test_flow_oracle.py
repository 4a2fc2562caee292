# SPDX-License-Identifier: MIT
"""The default's scalar rule, the mean slope along a gradient flow, against an integrator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpnopt.value.line import Flow, Line
from oracles.adaptor import library_coefficient, library_flow
from oracles.moreau_scalar import (
    LineModel,
    flow_coefficient,
    line_models,
    precise_flow,
    softmax_line,
)

FLOW_LINES = [softmax_line(np.array(z), np.eye(3)[0]) for z in ([0.0, 0.1, 0.3], [-3.0, 2.0, 0.0])]
FLOW_LINES.append(softmax_line(np.array([4.0, -1.0, 0.5]), np.eye(3)[0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(line_models(), st.floats(-4.0, 4.0), st.floats(-5.0, 5.0))
def test_flow_is_the_integrated_slope(line: LineModel, decade: float, q: float) -> None:
    expected = flow_coefficient(line, 10**decade, q)
    assert library_flow(line, 10**decade, q) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(line_models(), st.floats(-12.0, 8.0), st.floats(-8.0, 3.0), st.sampled_from([-1.0, 1.0]))
def test_flow_at_any_size(line: LineModel, decade: float, size: float, sign: float) -> None:
    """Against its transcendental equation in many digits, within the bound on the stiffness."""
    assert line.excess is not None
    s = min(10**decade, 1e12 / (line.omega * (1 + line.excess)))
    expected = precise_flow(line, s, sign * 10**size)
    assert library_flow(line, s, sign * 10**size) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("line", FLOW_LINES)
@pytest.mark.parametrize("start", [-1.0, 0.0, 1.0])
def test_flow_at_small_s_is_the_midpoint_rule(line: LineModel, start: float) -> None:
    """Second-order agreement with the envelope at half strength; none with the full one."""
    unit, q = 1 / (line.omega * (1 + (line.excess or 0))), start / line.omega

    def gap(s: float, strength: float) -> float:
        return abs(
            library_flow(line, s * unit, q) - library_coefficient(line, strength * s * unit, q)
        )

    assert gap(0.02, 0.5) / gap(0.01, 0.5) == pytest.approx(4.0, rel=0.1)
    assert gap(0.02, 1.0) / gap(0.01, 1.0) == pytest.approx(2.0, rel=0.1)
    assert gap(0.01, 0.5) < 0.05 * gap(0.01, 1.0)


@pytest.mark.parametrize("line", FLOW_LINES)
@pytest.mark.parametrize("start", [-2.0, 0.0, 2.0])
def test_strength_that_the_flow_amounts_to(line: LineModel, start: float) -> None:
    """It rises from 1/2 towards 1, as 1 - log(log A) / log A."""
    unit, q = 1 / (line.omega * (1 + (line.excess or 0))), start / line.omega
    seen = []
    for decade in range(-2, 12):
        s = unit * 10.0**decade
        mean = library_flow(line, s, q)
        seen.append((q - line.inverse_slope(mean)) / (s * mean))
        assert library_coefficient(line, seen[-1] * s, q) == pytest.approx(mean, rel=1e-6)
    assert seen[0] == pytest.approx(0.5, abs=0.01)
    assert all(a < b + 1e-6 for a, b in zip(seen, seen[1:], strict=False))
    assert 0.84 < seen[-1] < 1
    envelope = library_coefficient(line, s, q)
    assert 0.84 < envelope / mean < 1


def test_flow_of_no_length_is_the_plain_step() -> None:
    for line in FLOW_LINES:
        assert library_flow(line, 0.0, 0.0) == pytest.approx(1.0, abs=1e-13)
        assert library_flow(line, 1e-300, 0.3) == pytest.approx(line.slope(0.3), rel=1e-12)


def test_flow_stays_within_its_bounds() -> None:
    """Over 24 decades of S and of the curvature, and any q, for the least and largest bounds."""
    axis = torch.logspace(-12, 12, 13, dtype=torch.float64)
    q = torch.cat([-axis, torch.zeros(1, dtype=torch.float64), axis]).clamp(-1e10, 1e10)
    excess = torch.tensor([0.0, 1e-9, 1e-4, 0.1, 1.0, 1e4, 1e10], dtype=torch.float64)
    S, kappa, excess, q = (
        t.reshape(-1) for t in torch.meshgrid(axis, axis, excess, q, indexing="ij")
    )
    for dtype in (torch.float64, torch.float32):
        args = [t.to(dtype) for t in (kappa, excess, S, q)]
        found = Flow.of(Line(args[0], args[1]), args[2])(args[3])
        assert found.dtype == dtype and bool(found.isfinite().all())
        assert bool((found >= 0).all()) and bool((found <= (1 + args[1]) * (1 + 1e-6)).all())
        uphill = args[3] >= 0  # the logistic is not underflowed there
        assert bool((found[uphill] > 0).all())
