# SPDX-License-Identifier: MIT
"""The flow for the quadratic line, too (the library takes the envelope there)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.typing import Tensor
from ddpnopt.value import VALUES, Moreau
from ddpnopt.value.base import Recursion, TerminalCost
from ddpnopt.value.line import SHORTEST, Line
from ddpnopt.value.moreau import MoreauRecursion


@dataclass(frozen=True, eq=False)
class QuadraticSlope:
    """Mean slope (1 + kappa q) (1 - exp(-kappa S)) / (kappa S) of the flow of length S."""

    line: Line
    S: Tensor

    def __call__(self, q: Tensor | None) -> Tensor:
        """The coefficient."""
        length = (self.line.kappa * self.S).clamp(min=SHORTEST)
        mean = -torch.expm1(-length) / length
        return mean if q is None else mean * (1 + self.line.kappa * q)

    def rows(self) -> Sequence[QuadraticSlope]:
        """One for each row of S."""
        return [QuadraticSlope(self.line, S) for S in self.S.unbind()]


@dataclass(frozen=True)
class QuadraticFlow(Moreau):
    """`ddpnopt.value.Moreau` whose quadratic line is followed by its flow."""

    line: str = "quadratic"
    name: ClassVar[str] = "quadratic-flow"

    def start(self, terminal: TerminalCost) -> Recursion:
        """With the other rule."""
        recursion = super().start(terminal)
        assert isinstance(recursion, MoreauRecursion)
        recursion.slope = QuadraticSlope
        return recursion


VALUES[QuadraticFlow.name] = QuadraticFlow
