# SPDX-License-Identifier: MIT
"""M = I: gradient descent, with heavy-ball momentum as torch.optim.SGD has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ddpnopt.curvature.base import Curvature, Rate, State, momentum_step
from ddpnopt.typing import Tensor


@dataclass(frozen=True)
class Identity(Curvature):
    """The curvature of SGD."""

    name: ClassVar[str] = "identity"

    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> None:
        """No statistics."""
        return None

    def inverse(self, state: State, moment: Tensor | None) -> None:
        """The identity."""
        return None

    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: Rate, momentum: float
    ) -> dict[str, Any]:
        """b <- mu b + d, u <- u - eta b."""
        return momentum_step(p, d, state, lr, momentum)
