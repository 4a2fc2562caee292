# SPDX-License-Identifier: MIT
"""The value function as a Moreau envelope of the loss along each sample's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from ddpnopt.ranges import check_choice, check_number, check_switch, not_negative
from ddpnopt.typing import Tensor
from ddpnopt.value.base import (
    STATISTICS,
    Blocks,
    Coupling,
    Maps,
    Policy,
    Recursion,
    TerminalCost,
    ValueFunction,
    mean_field,
)
from ddpnopt.value.line import Envelope, Flow, Line, Slope

LINES = ("auto", "quadratic")
#: Coefficients of (line, S).
Rule = Callable[[Line, Tensor], Slope]


@dataclass(frozen=True)
class Moreau(ValueFunction):
    """One bounded scalar model a sample; the default.

    Args:
        own_layer: S_t includes the layer's own step (Q_uu contains f_u^T V_xx f_u).
        line: "auto" takes the logistic line where the terminal cost has a bounded slope;
            "quadratic" takes l' = 1 + kappa delta always.
        coupling: Multiply s_k by rho, the mean-field of the samples' joint step.
        strength: The factor c on S of the Moreau envelope. None: what suits the curvature, 1 but
            for AdamW (1/2); and for the logistic line the coefficient is then the line's average
            slope along its gradient flow of that length, the envelope with a factor that rises
            from 1/2 at small S to 1 at large S.
        statistics: "plain": M is fed with the plain gradient; "value": with Q_u.

    Raises:
        ValueError: An option is out of range.
    """

    own_layer: bool = True
    line: str = "auto"
    coupling: bool = True
    strength: float | int | None = None
    statistics: str = "plain"

    name: ClassVar[str] = "moreau"
    linearization: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("Moreau", "line", self.line, LINES)
        check_choice("Moreau", "statistics", self.statistics, STATISTICS)
        check_switch("Moreau", "own_layer", self.own_layer)
        check_switch("Moreau", "coupling", self.coupling)
        if self.strength is not None:
            check_number("Moreau", "strength", self.strength, not_negative, "must not be negative")

    def start(self, terminal: TerminalCost) -> Recursion:
        """S = 0 at the output."""
        excess = terminal.excess if self.line == "auto" else None
        return MoreauRecursion(self, Line(terminal.kappa, excess), terminal.w)


class MoreauRecursion(Recursion):
    """S_t grows by every layer's own step; envelopes add.

    With ``statistics="plain"`` no gain depends on S: the layers' steps are collected, and all S
    are summed at once when the recursion is closed.
    """

    def __init__(self, options: Moreau, line: Line, w: Tensor) -> None:
        self.options, self.line, self.w = options, line, w
        flows = options.strength is None and line.excess is not None
        self.slope: Rule = Flow.of if flows else Envelope
        self.S = torch.zeros_like(w)
        self._waiting: list[_EnvelopePolicy] = []
        self._squares: list[Tensor] = []
        self._strengths: list[float] = []
        self._couplings: list[Coupling] = []

    def correction(self, maps: Maps) -> Blocks | None:
        """(V_{t+1}'(0) - 1) g."""
        self.close()
        return maps.combine(self.slope(self.line, self.S)(None) - 1, None)

    def back(self, maps: Maps, bottom: bool) -> Policy:
        """S_t = S_{t+1} + c rho s_t, s_t = eta G_u^T M^-1 G_u / w."""
        squares = maps.lengths()
        policy = _EnvelopePolicy(self.w)
        strength = self.options.strength
        self._waiting.append(policy)
        self._squares.append(squares)
        self._strengths.append(maps.strength if strength is None else float(strength))
        if self.options.coupling:
            self._couplings.append(maps.coupling(squares))
        return policy

    def close(self) -> None:
        """Sum the collected steps, from the output backwards."""
        if not self._waiting:
            return
        squares = torch.stack([one.to(self.w) for one in self._squares])
        s = squares / self.w
        if any(c != 1.0 for c in self._strengths):
            s = s * s.new_tensor(self._strengths)[:, None]
        if self.options.coupling:
            s = s * mean_field(self._couplings, squares, self.pool)[:, None]
        # An overflow to infinity would make q - S l' undefined; any huge S gives the same step.
        S = (s.cumsum_(0) + self.S).clamp_(max=torch.finfo(s.dtype).max ** 0.5)
        own = S if self.options.own_layer else torch.cat([self.S[None], S[:-1]])
        slope = self.slope(self.line, own)
        feedforward = _Feedforward(slope)
        rows = zip(self._waiting, own.unbind(), slope.rows(), strict=True)
        for index, (policy, one, its) in enumerate(rows):
            policy.S, policy.slope, policy.feedforward, policy.index = one, its, feedforward, index
        self.S = S[-1]
        self._waiting, self._squares, self._strengths, self._couplings = [], [], [], []


@dataclass(eq=False)
class _Feedforward:
    """The coefficients of all layers at q = 0, found at once."""

    slope: Slope

    @cached_property
    def coefficients(self) -> Tensor:
        """(layers, B)."""
        return self.slope(None)


class _EnvelopePolicy(Policy):
    """d_t = sum_i w V_t'(q_t) g_u,i, q_t = g_x . dx_t in units of the plain loss."""

    slope: Slope
    feedforward: _Feedforward
    index: int

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors (coefficient - 1) g."""
        assert self.S is not None, "the recursion has not been closed"
        if dx is None:
            self.coefficient = self.feedforward.coefficients[self.index]
        else:
            self.coefficient = self.slope(maps.project(dx)[:, 0] / self.w)
        return maps.combine(self.coefficient - 1, None)
