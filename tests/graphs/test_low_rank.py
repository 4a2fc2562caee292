# SPDX-License-Identifier: MIT
"""`low_rank` on nets of every kind of graph against the dense recursion on the explicit state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from ddpnopt.errors import DDPNOptWarning
from oracles.graph_cases import compare_gauss_newton, compare_low_rank
from oracles.graph_nets import FEW, NETS, PARTLY, Case, net
from oracles.graph_random import random_nets

# Feedback that is quietly off would be a warning.
pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("terminal", ["cross_entropy", "mse"])
def test_every_net(name: str, terminal: str) -> None:
    compare_low_rank(net(name), terminal=terminal)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("backup", ["proximal", "closed_loop", "riccati"])
@pytest.mark.parametrize("own_layer", [False, True])
def test_backups(name: str, backup: str, own_layer: bool) -> None:
    compare_low_rank(net(name), backup=backup, own_layer=own_layer, count=3)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_rmsprop(name: str, momentum: float) -> None:
    compare_low_rank(net(name), curvature="rmsprop", momentum=momentum)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("options", [{}, {"backup": "riccati"}, {"own_layer": True}])
def test_gauss_newton(name: str, options: dict[str, object]) -> None:
    compare_gauss_newton(net(name), **options)


@pytest.mark.parametrize("name", FEW)
def test_open_loop(name: str) -> None:
    compare_low_rank(net(name), feedback="open_loop")


@pytest.mark.parametrize("name", PARTLY)
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
def test_bare_parameters_move_before_the_rollout(name: str, curvature: str) -> None:
    with pytest.warns(DDPNOptWarning, match="'bare.offset', 'bare.scale' take the .* plain step"):
        compare_low_rank(net(name), curvature=curvature)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(random_nets())
def test_random_nets(case: Case) -> None:
    compare_low_rank(case, count=1)
