# SPDX-License-Identifier: MIT
"""One comparison of the library with a graph oracle: the loss, its models, the plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import RMSprop
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.common import Loss, cross_entropy, rank_one, squared
from oracles.flat import Inner
from oracles.graph import Net
from oracles.graph_dense import DenseGraph
from oracles.graph_moreau import MoreauGraph
from oracles.graph_nets import Case
from oracles.moreau_scalar import LineModel, quadratic_line, softmax_line

Lines = Callable[[Tensor], list[LineModel]]

#: eps and alpha of the test's RMSprop.
EPS, ALPHA = 1e-3, 0.9
CURVATURES = {"identity": "identity", "rmsprop": RMSprop(alpha=ALPHA, eps=EPS)}


def problem(inputs: Sequence[Tensor], terminal: str) -> tuple[Loss, Loss, Tensor, Lines]:
    """Loss, per-sample Hessians, w and line models of three outputs."""
    batch = len(inputs[0])
    w = torch.full((batch,), 1 / batch, dtype=torch.float64)
    if terminal == "mse":
        y, loss, hessian = squared(inputs[0], 3)
        factor = (2 / 3) ** 0.5 * np.eye(3)

        def quadratic(z: Tensor) -> list[LineModel]:
            return [quadratic_line(factor, g) for g in (2 / 3 * (z - y)).numpy()]

        return loss, hessian, w, quadratic
    y, loss, hessian = cross_entropy(inputs[0], 3)
    target = F.one_hot(y, 3).double().numpy()

    def softmax(z: Tensor) -> list[LineModel]:
        return [softmax_line(a, b) for a, b in zip(z.numpy(), target, strict=True)]

    return loss, hessian, w, softmax


def train(net: Net, inputs: Sequence[Tensor], loss: Loss, count: int, **options: object) -> DDPNOpt:
    """The plain loop on one batch."""
    opt = DDPNOpt(net, **options)  # type: ignore[arg-type]
    for _ in range(count):
        opt.zero_grad()
        loss(net(*inputs)).backward()
        opt.step()
    return opt


def inner(lr: float, curvature: str, momentum: float = 0.0) -> Inner:
    """The oracle's optimizer."""
    return Inner(lr, momentum, curvature, alpha=ALPHA, eps=EPS)


def compare_low_rank(
    case: Case,
    *,
    written: Net | None = None,
    terminal: str = "cross_entropy",
    curvature: str = "identity",
    momentum: float = 0.0,
    count: int = 2,
    feedback: object = True,
    **options: object,
) -> None:
    """Steps of ``LowRank`` equal the dense recursion on the augmented state."""
    net, inputs = case
    loss, hessian, _, _ = problem(inputs, terminal)
    lr = {"identity": 0.3, "rmsprop": 0.02}[curvature]
    reference = DenseGraph(
        copy.deepcopy(net), inner(lr, curvature, momentum), feedback=feedback is True, **options
    )
    for _ in range(count):
        reference.step(inputs, loss, hessian)
    train(
        net if written is None else written,
        inputs,
        loss,
        count,
        lr=lr,
        momentum=momentum,
        curvature=CURVATURES[curvature],
        value=LowRank(**options),  # type: ignore[arg-type]
        terminal="mse" if terminal == "mse" else "auto",
        feedback=feedback,
        gram="exact",
    )
    reference.assert_equals(net if written is None else written)


def compare_gauss_newton(case: Case, **options: object) -> None:
    """Where the terminal Hessian has rank one, ``GaussNewton`` equals the dense recursion too."""
    net, inputs = case
    factor, loss, hessian = rank_one(inputs[0], 3)
    reference = DenseGraph(copy.deepcopy(net), inner(0.3, "identity"), **options)  # type: ignore[arg-type]
    for _ in range(2):
        reference.step(inputs, loss, hessian)
    value = GaussNewton(**options)  # type: ignore[arg-type]
    train(net, inputs, loss, 2, lr=0.3, value=value, terminal=factor, gram="exact")
    reference.assert_equals(net)


def compare_moreau(
    case: Case,
    *,
    written: Net | None = None,
    terminal: str = "cross_entropy",
    curvature: str = "identity",
    momentum: float = 0.0,
    count: int = 2,
    feedback: object = True,
    lr: float | None = None,
    **options: object,
) -> MoreauGraph:
    """Steps of ``Moreau`` equal the rule on the augmented state, sample by sample."""
    net, inputs = case
    loss, _, w, lines = problem(inputs, terminal)
    lr = lr or {"identity": 1.0, "rmsprop": 0.05}[curvature]
    reference = MoreauGraph(
        copy.deepcopy(net), inner(lr, curvature, momentum), feedback=feedback is True, **options
    )
    for _ in range(count):
        reference.step(inputs, loss, w, lines)
    train(
        net if written is None else written,
        inputs,
        loss,
        count,
        lr=lr,
        momentum=momentum,
        curvature=CURVATURES[curvature],
        value=Moreau(**options),  # type: ignore[arg-type]
        terminal="mse" if terminal == "mse" else "auto",
        feedback=feedback,
        gram="exact",
    )
    reference.assert_equals(net if written is None else written)
    return reference
