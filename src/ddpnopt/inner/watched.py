# SPDX-License-Identifier: MIT
"""Any other optimizer: watched from outside."""

from __future__ import annotations

from ddpnopt.curvature import Identity
from ddpnopt.hyperparameters import Hyper
from ddpnopt.inner.base import Group, Reader
from ddpnopt.typing import Tensor


class Watched(Reader):
    """P = <update, d> / |d|^2 of the step before; nothing else is known.

    The update of a re-weighted gradient is multiplied by min(<d, gbar> / |gbar|^2, 1), since the
    optimizer may divide its gradient by the gradient's own size (Lion, Muon, Shampoo).
    """

    rescales = True

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """The gain that was seen."""
        return Hyper(gain, 0.0, 0.0, Identity())
