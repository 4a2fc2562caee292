# SPDX-License-Identifier: MIT
"""M = diag(sqrt(v) + eps), v a running mean of squared gradients, as torch.optim.RMSprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ddpnopt.curvature.base import (
    Curvature,
    Rate,
    State,
    descend,
    descend_quotient,
    larger,
    seen,
)
from ddpnopt.ranges import check_choice, check_number, not_negative, share
from ddpnopt.typing import Tensor

SECOND_MOMENTS = ("batch", "per_sample")


@dataclass(frozen=True)
class RMSprop(Curvature):
    """The curvature of RMSprop.

    Args:
        alpha: Decay of the running mean v.
        eps: Added to sqrt(v).
        second_moment: "batch" squares the mean gradient, as torch does; "per_sample" takes the
            mean of the samples' squared gradients (Table 2), larger and far more robust.

    Raises:
        ValueError: An option is out of range.
    """

    alpha: float | int = 0.99
    eps: float | int = 1e-8
    second_moment: str = "batch"

    name: ClassVar[str] = "rmsprop"

    def __post_init__(self) -> None:
        """Check the options."""
        check_number("RMSprop", "alpha", self.alpha, share, "must lie in [0, 1)")
        check_number("RMSprop", "eps", self.eps, not_negative, "must not be negative")
        check_choice("RMSprop", "second_moment", self.second_moment, SECOND_MOMENTS)

    @property
    def statistics(self) -> str:
        """Squares of the batch gradient or of each sample's."""
        return "gradient" if self.second_moment == "batch" else "squares"

    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """v <- alpha v + (1 - alpha) g^2."""
        v = state.get("square_avg")
        v = torch.zeros_like(gradient) if v is None else v.mul(self.alpha)
        if squares is not None:
            return v.add_(squares, alpha=1 - self.alpha)
        return v.addcmul_(gradient, gradient, value=1 - self.alpha)

    def inverse(self, state: State, moment: Tensor | None) -> Tensor:
        """1 / (sqrt(v) + eps); a coordinate that never had a gradient does not move (0, not inf).

        With eps = 0 and v = 0 the limit of s = g^2 / M is 0, since g^2 <= v / (1 - alpha).
        """
        assert moment is not None
        return seen(moment).sqrt_().add_(self.eps).reciprocal_()

    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: Rate, momentum: float
    ) -> dict[str, Any]:
        """b <- mu b + M^-1 d, u <- u - eta b."""
        assert moment is not None
        M = moment.sqrt().add_(self.eps)
        if momentum == 0:
            descend_quotient(p, d, M, lr)
            return {"square_avg": moment}
        buffer = state.get("momentum_buffer")
        buffer = torch.zeros_like(d) if buffer is None else buffer.mul(momentum)
        buffer.addcdiv_(d, M)
        descend(p, buffer, lr)
        return {"square_avg": moment, "momentum_buffer": buffer}

    def follow(
        self, state: State, gradient: Tensor, d: Tensor, moment: Tensor | None
    ) -> Tensor | None:
        """Feed v with max(g^2, d^2): what shrinks d must not be divided out again by sqrt(v)."""
        if self.second_moment == "per_sample":
            return moment
        return self.moment(state, larger(d, gradient), None)
