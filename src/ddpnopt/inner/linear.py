# SPDX-License-Identifier: MIT
"""Optimizers whose update is linear in the gradient: SGD with or without momentum, ASGD."""

from __future__ import annotations

from ddpnopt.curvature import Identity
from ddpnopt.decisions import as_number
from ddpnopt.hyperparameters import Hyper
from ddpnopt.inner.base import Group, Reader, coupled
from ddpnopt.typing import Tensor


class SGD(Reader):
    """P = lr (1 - dampening) / (1 - momentum): the step's effect over the momentum's life."""

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group alone."""
        momentum = float(group["momentum"])
        damped = 1 - float(group["dampening"]) if momentum else 1.0
        return Hyper(as_number(group["lr"]) * damped, momentum, coupled(group), Identity())


class ASGD(Reader):
    """P = lr; its own decay of the rate is left out, which errs on the safe side."""

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group alone."""
        return Hyper(as_number(group["lr"]), 0.0, coupled(group), Identity())
