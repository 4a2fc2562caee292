# SPDX-License-Identifier: MIT
"""The loss itself, as a function of the output: what G = w (p - y) tells of the targets y.

A terminal cost is fitted from one output and its gradient. Where its form is known, so are the
targets, and the loss at any other output up to a constant that does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpnopt.rows import chunks, working
from ddpnopt.typing import Tensor

#: The loss of a pass at a new output of the recorded one's shape, in the loss's own units.
Objective = Callable[[Tensor], Tensor]


def softmax_objective(z: Tensor, G: Tensor, w: Tensor, axis: int) -> Objective:
    """Cross-entropy with targets p - G / w, summed with w.

    Args:
        z: Logits, classes along ``axis``.
        G: Their gradient.
        w: Factor of each row, of the rows' number.
        axis: Class axis.
    """
    weight = w.reshape(-1, 1).to(working(z))

    def value(new: Tensor) -> Tensor:
        total = weight.new_zeros(())
        for part, (old, g, scores) in chunks(axis, z, G, new):
            used = weight[part] > 0
            share = torch.where(used, g.to(weight) / torch.where(used, weight[part], 1), 0)
            targets = torch.softmax(old, -1, dtype=weight.dtype) - share
            log_p = scores.log_softmax(-1, dtype=weight.dtype)
            total = total - (weight[part] * targets * log_p).sum()
        return total

    return value


def logistic_objective(z: Tensor, G: Tensor, w: Tensor) -> Objective:
    """Binary cross-entropy with targets sigma(z) - G / w."""
    weight = w.reshape(z.shape).to(z.dtype)
    used = weight > 0
    share = torch.where(used, G.to(z.dtype) / torch.where(used, weight, 1), 0)
    targets = torch.sigmoid(z) - share

    def value(new: Tensor) -> Tensor:
        new = new.to(z.dtype)
        return (weight * (torch.nn.functional.softplus(new) - targets * new)).sum()

    return value


def squared_objective(z: Tensor, G: Tensor, curvature: float) -> Objective:
    """curvature / 2 |z - y|^2 with y = z - G / curvature."""
    y = z - G.to(z.dtype) / curvature
    return lambda new: curvature / 2 * (new.to(z.dtype) - y).square().sum()
