# SPDX-License-Identifier: MIT
"""The loss at another output, from one output and its gradient, against the loss itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpnopt import MSE
from ddpnopt.recognition import Recogniser, Terminal

Y = torch.tensor([0, 2, 1, 2, 0, 1])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0]).double()
SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)).double().softmax(1)
BITS = (SOFT > 0.3).double()

CASES: dict[str, tuple[Terminal | MSE, Callable[[Tensor], Tensor]]] = {
    "mean": ("auto", lambda z: F.cross_entropy(z, Y)),
    "scaled": ("auto", lambda z: 7 * F.cross_entropy(z, Y, reduction="sum")),
    "class weights": ("auto", lambda z: F.cross_entropy(z, Y, weight=WEIGHTS)),
    "ignored": ("auto", lambda z: F.cross_entropy(z, torch.where(Y == 1, -100, Y))),
    "smoothed": ("auto", lambda z: F.cross_entropy(z, Y, label_smoothing=0.1)),
    "soft targets": ("cross_entropy", lambda z: F.cross_entropy(z, SOFT)),
    "logistic": (
        "bce_with_logits",
        lambda z: F.binary_cross_entropy_with_logits(z, BITS),
    ),
    "squared": ("mse", lambda z: F.mse_loss(z, SOFT)),
    "squared sum": (MSE(reduction="sum"), lambda z: F.mse_loss(z, SOFT, reduction="sum")),
}


@pytest.mark.parametrize("case", CASES)
def test_differences_of_the_loss(case: str) -> None:
    terminal, loss = CASES[case]
    z = torch.randn(6, 3).double().requires_grad_()
    (G,) = torch.autograd.grad(loss(z), z)
    cost = Recogniser(terminal)(z.detach(), G, -1, 6)
    assert cost is not None and cost.value is not None
    for _ in range(3):
        new = torch.randn(6, 3).double()
        expected = loss(new) - loss(z.detach())
        torch.testing.assert_close(cost.value(new) - cost.value(z.detach()), expected)


def test_a_callable_factor_tells_no_loss() -> None:
    z = torch.randn(6, 3).double()
    cost = Recogniser(lambda z: torch.eye(3).double().expand(6, 3, 3))(z, z, -1, 6)
    assert cost is not None and cost.value is None
