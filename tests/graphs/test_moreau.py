# SPDX-License-Identifier: MIT
"""`moreau` on nets of every kind of graph against the rule on the explicit augmented state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from ddpnopt.errors import DDPNOptWarning
from oracles.graph_cases import compare_moreau
from oracles.graph_nets import FEW, NETS, PARTLY, Case, net
from oracles.graph_random import random_nets

# Feedback that is quietly off would be a warning.
pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("terminal", ["cross_entropy", "mse"])
def test_every_net(name: str, terminal: str) -> None:
    seen = compare_moreau(net(name), terminal=terminal)
    assert min(float(c.min()) for c in seen.coefficients.values()) < 0.98  # the rule is at work


@pytest.mark.parametrize("name", NETS)
def test_envelope(name: str) -> None:
    compare_moreau(net(name), strength=1.0, count=1)


@pytest.mark.parametrize("name", NETS)
def test_open_loop_is_q_zero(name: str) -> None:
    compare_moreau(net(name), feedback="open_loop", count=1)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("options", [{"own_layer": False}, {"coupling": False}])
def test_options(name: str, options: dict[str, object]) -> None:
    compare_moreau(net(name), count=1, **options)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_rmsprop(name: str, momentum: float) -> None:
    compare_moreau(net(name), curvature="rmsprop", momentum=momentum)


@pytest.mark.parametrize("name", PARTLY)
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
def test_bare_parameters_move_before_the_rollout(name: str, curvature: str) -> None:
    with pytest.warns(DDPNOptWarning, match="'bare.offset', 'bare.scale' take the .* plain step"):
        compare_moreau(net(name), curvature=curvature, count=1)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(random_nets())
def test_random_nets(case: Case) -> None:
    compare_moreau(case, count=1)
