# SPDX-License-Identifier: MIT
"""Adaptive clipping (AGC, Brock et al. 2021) as a curvature: the step still grows with the rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ddpnopt.curvature import CURVATURES, Trust
from ddpnopt.curvature.base import State
from ddpnopt.typing import Tensor


@dataclass(frozen=True)
class Clipped(Trust):
    """`ddpnopt.curvature.Trust` whose bound is on the gradient, |M^-1 g| <= tau |u|.

    Args:
        tau: Largest ratio of the norms.
    """

    tau: float | int | None = 0.02

    name: ClassVar[str] = "clipped"

    def _with_factor(self, state: State, gradient: Tensor, own: Tensor | None) -> Tensor:
        return super()._with_factor({**state, "rate": 1.0}, gradient, own)


CURVATURES[Clipped.name] = Clipped
