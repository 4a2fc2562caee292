# SPDX-License-Identifier: MIT
"""M = diag(sqrt(v / (1 - beta2^t)) + eps), with a running mean of d, as torch.optim.AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ddpnopt.curvature.base import Curvature, Rate, State, descend_quotient, larger, seen
from ddpnopt.ranges import check_number, not_negative, share
from ddpnopt.typing import Tensor


def _two_shares(betas: Any) -> bool:
    return len(betas) == 2 and all(share(beta) for beta in betas)


@dataclass(frozen=True)
class AdamW(Curvature):
    """The curvature of AdamW; weight decay is decoupled, and 0 unless the group says otherwise.

    Args:
        betas: Decays of the running means of d and of the squared gradient.
        eps: Added to the square root.

    Raises:
        ValueError: An option is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | int = 1e-8

    name: ClassVar[str] = "adamw"
    decoupled: ClassVar[bool] = True
    heavy_ball: ClassVar[bool] = False
    #: With 1 it lost up to a point below its best rates, where it is under-tuned anyway.
    strength: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        check_number("AdamW", "betas", self.betas, _two_shares, "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        check_number("AdamW", "eps", self.eps, not_negative, "must not be negative")

    @property
    def statistics(self) -> str:
        """Squares of the batch gradient."""
        return "gradient"

    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """v <- beta2 v + (1 - beta2) g^2."""
        v = state.get("exp_avg_sq")
        v = torch.zeros_like(gradient) if v is None else v.mul(self.betas[1])
        return v.addcmul_(gradient, gradient, value=1 - self.betas[1])

    def inverse(self, state: State, moment: Tensor | None) -> Tensor:
        """1 / (sqrt(v^) + eps): the step's effect over the life of the running mean of d.

        The factor 1 - beta1 of a single step is made up for by the steps that follow. A coordinate
        that never had a gradient does not move (0, not inf).
        """
        assert moment is not None
        correction = self._correction(state.get("step", 0) + 1, moment.dtype)
        return seen(moment).sqrt_().div_(correction).add_(self.eps).reciprocal_()

    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: Rate, momentum: float
    ) -> dict[str, Any]:
        """m <- beta1 m + (1 - beta1) d, u <- u - eta m^ / (sqrt(v^) + eps)."""
        assert moment is not None
        step = state.get("step", 0) + 1
        m = state.get("exp_avg")
        m = torch.zeros_like(d) if m is None else m
        # A layer's rule gives half precision's d wider than autograd does, which other steps take.
        m = m.lerp(d.to(m.dtype), 1 - self.betas[0])
        M = moment.sqrt().div_(self._correction(step, moment.dtype)).add_(self.eps)
        descend_quotient(p, m, M, lr / (1 - self.betas[0] ** step))
        return {"step": step, "exp_avg": m, "exp_avg_sq": moment}

    def _correction(self, step: int | Tensor, dtype: torch.dtype) -> float | Tensor:
        """Of sqrt(v) for having begun at 0."""
        if isinstance(step, Tensor):  # as exact as a number, and then of v's dtype
            return torch.sqrt(1 - self.betas[1] ** step).to(dtype)
        return float((1 - self.betas[1] ** step) ** 0.5)

    def follow(
        self, state: State, gradient: Tensor, d: Tensor, moment: Tensor | None
    ) -> Tensor | None:
        """Feed v with max(g^2, d^2): what shrinks d must not be divided out again by sqrt(v)."""
        return self.moment(state, larger(d, gradient), None)
