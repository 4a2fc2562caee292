# SPDX-License-Identifier: MIT
"""Every quadratic value function against a dense DDP step with explicit Jacobians."""

from __future__ import annotations

import copy

import pytest

from ddpnopt.curvature import Identity, RMSprop
from ddpnopt.value import Dense, GaussNewton, LowRank
from oracles.common import (
    CONVOLUTIONS,
    assert_params,
    conv_chain,
    cross_entropy,
    dense_chain,
    input_for,
    rank_one,
    squared,
    steps,
)
from oracles.dense_ddp import DenseDDP
from oracles.flat import Chain, Inner

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

BACKUPS = ("proximal", "closed_loop", "riccati")
LR = {"identity": 0.3, "rmsprop": 0.02}


def curvature(name: str, second_moment: str = "batch") -> Identity | RMSprop:
    if name == "identity":
        return Identity()
    return RMSprop(alpha=0.9, eps=1e-3, second_moment=second_moment)


def inner(name: str, momentum: float = 0.0) -> Inner:
    return Inner(LR[name], momentum, name, alpha=0.9, eps=1e-3)


def net(kind: str) -> Chain:
    return (
        dense_chain([4, 5, 4, 3], "tanh")
        if kind == "dense"
        else conv_chain([CONVOLUTIONS[1], {"kernel_size": 2}], 3, "softplus")
    )


def compare(
    value: object,
    kind: str = "dense",
    name: str = "identity",
    terminal: str = "cross_entropy",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    second_moment: str = "batch",
    count: int = 3,
    **oracle: object,
) -> None:
    model = net(kind)
    x = input_for(model, 4)
    first, loss, hessian = {
        "cross_entropy": cross_entropy,
        "mse": squared,
        "rank_one": rank_one,
    }[terminal](x, 3)
    reference = DenseDDP(
        copy.deepcopy(model),
        inner(name, momentum),
        weight_decay=weight_decay,
        second_moment=second_moment,
        **oracle,  # type: ignore[arg-type]
    )
    for _ in range(count):
        reference.step(x, loss, hessian)
    steps(
        model,
        x,
        loss,
        count,
        lr=LR[name],
        curvature=curvature(name, second_moment),
        value=value,
        terminal=first if terminal == "rank_one" else terminal,
        momentum=momentum,
        weight_decay=weight_decay,
        gram="exact",
    )
    assert_params(model, reference.params)


@pytest.mark.parametrize("form", [Dense, LowRank])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("backup", BACKUPS)
def test_backups(form: type, kind: str, name: str, backup: str) -> None:
    compare(form(backup=backup), kind, name, backup=backup)


@pytest.mark.parametrize("form", [Dense, LowRank])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
def test_squared_error(form: type, kind: str, name: str) -> None:
    compare(form(), kind, name, terminal="mse")


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("backup", BACKUPS)
def test_gauss_newton(kind: str, name: str, backup: str) -> None:
    compare(GaussNewton(backup=backup), kind, name, "rank_one", backup=backup)


@pytest.mark.parametrize("form", [Dense, LowRank, GaussNewton])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("backup", BACKUPS)
def test_own_layer(form: type, kind: str, backup: str) -> None:
    terminal = "rank_one" if form is GaussNewton else "cross_entropy"
    options = {"backup": backup, "own_layer": True}
    compare(form(**options), kind, "rmsprop", terminal, **options)


@pytest.mark.parametrize("form", [Dense, LowRank, GaussNewton])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("clip", [0.05, 0.5])
@pytest.mark.parametrize("own_layer", [False, True])
def test_clip(form: type, kind: str, clip: float, own_layer: bool) -> None:
    terminal = "rank_one" if form is GaussNewton else "cross_entropy"
    options = {"clip": clip, "own_layer": own_layer}
    compare(form(**options), kind, "identity", terminal, **options)


@pytest.mark.parametrize("form", [Dense, LowRank, GaussNewton])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
def test_momentum_and_decay(form: type, name: str) -> None:
    terminal = "rank_one" if form is GaussNewton else "cross_entropy"
    compare(form(), "dense", name, terminal, momentum=0.6, weight_decay=0.05)


@pytest.mark.parametrize("form", [Dense, LowRank, GaussNewton])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_per_sample_second_moment(form: type, kind: str, weight_decay: float) -> None:
    terminal = "rank_one" if form is GaussNewton else "cross_entropy"
    compare(
        form(),
        kind,
        "rmsprop",
        terminal,
        second_moment="per_sample",
        weight_decay=weight_decay,
    )


@pytest.mark.parametrize("form", [Dense, LowRank, GaussNewton])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_plain_statistics(form: type, weight_decay: float) -> None:
    terminal = "rank_one" if form is GaussNewton else "cross_entropy"
    compare(
        form(statistics="plain"),
        "dense",
        "rmsprop",
        terminal,
        statistics="plain",
        weight_decay=weight_decay,
    )


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["identity", "rmsprop"])
@pytest.mark.parametrize("backup", BACKUPS)
def test_regularization(kind: str, name: str, backup: str) -> None:
    options = {"backup": backup, "regularization": 1e-2}
    compare(Dense(**options), kind, name, **options)
