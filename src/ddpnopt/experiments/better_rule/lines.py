# SPDX-License-Identifier: MIT
"""The flow for the quadratic line, too (the library takes the envelope there)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.typing import Tensor
from ddpnopt.value import VALUES, Moreau
from ddpnopt.value.base import Recursion, TerminalCost
from ddpnopt.value.line import SHORTEST, Line


def quadratic_flow(line: Line, S: Tensor, q: Tensor | None) -> Tensor:
    """Mean slope (1 + kappa q) (1 - exp(-kappa S)) / (kappa S) of the flow of length S."""
    length = (line.kappa * S).clamp(min=SHORTEST)
    mean = -torch.expm1(-length) / length
    return mean if q is None else mean * (1 + line.kappa * q)


@dataclass(frozen=True)
class QuadraticFlow(Moreau):
    """`ddpnopt.value.Moreau` whose quadratic line is followed by its flow."""

    line: str = "quadratic"
    name: ClassVar[str] = "quadratic-flow"

    def start(self, terminal: TerminalCost) -> Recursion:
        """With the other rule."""
        recursion = super().start(terminal)
        recursion.coefficient = quadratic_flow  # type: ignore[attr-defined]
        return recursion


VALUES[QuadraticFlow.name] = QuadraticFlow
