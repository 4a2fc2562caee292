# SPDX-License-Identifier: MIT
"""Explicit V_x (X) and V_xx (X x X) per sample: the paper's form, and an oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.ranges import check_choice, check_number, not_negative
from ddpnopt.typing import Tensor
from ddpnopt.value.backups import clip_factor, dense_backup
from ddpnopt.value.base import Blocks, Maps, Policy, Recursion, TerminalCost
from ddpnopt.value.explicit import Explicit
from ddpnopt.value.quadratic import Quadratic
from ddpnopt.value.second_order import SecondOrder

DYNAMICS = ("first_order", "second_order")


@dataclass(frozen=True)
class Dense(Quadratic):
    """The full value function; memory B X^2 a layer.

    Args:
        regularization: eps_Vxx, V_xx + eps I after every pull-back to a state (Algorithm 3), in
            the units of the loss that autograd sees (which carries 1/B for a mean).
        dynamics: "first_order" (Gauss-Newton), or "second_order": Q_xx, Q_ux and Q_uu contain
            V'_x . f_xx, f_ux and f_uu, by one more pass cut at its layers; memory B U X a layer
            with U parameters. V_xx may then be indefinite. Needs the closed loop.
    """

    regularization: float | int = 0.0
    dynamics: str = "first_order"

    name: ClassVar[str] = "dense"
    linearization: ClassVar[str] = "jacobian"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("Dense", "dynamics", self.dynamics, DYNAMICS)
        bound = "must not be negative"
        check_number("Dense", "regularization", self.regularization, not_negative, bound)

    @property
    def segments(self) -> bool:
        """The functions between the layers are needed, for their second derivatives."""
        return self.dynamics == "second_order"

    def start(self, terminal: TerminalCost) -> Recursion:
        """V_h = g and V_hh = S S^T at the output."""
        factor = terminal.hessian_factor()
        if self.segments:
            rules = self.backup, self.own_layer, self.clip
            return SecondOrder(factor, self.regularization, *rules)
        return _Matrices(self, factor)


class _Matrices(Explicit):
    """First-order dynamics: everything stays in h-space."""

    def __init__(self, options: Dense, factor: Tensor) -> None:
        super().__init__(factor, options.regularization)
        self.options = options

    def backup(
        self, maps: Maps, V_h: Tensor, V_hh: Tensor, bottom: bool
    ) -> tuple[Policy, tuple[Tensor, Tensor] | None]:
        """Backup in h-space, pull-back by g_x (eq. 13)."""
        D = maps.curvature()
        k, K = V_h, V_hh
        if self.options.own_layer:
            k, K = dense_backup("proximal", V_h, V_hh, D)
        policy = _MatrixPolicy(self.options, k, K)
        if bottom:
            return policy, None
        same = self.options.own_layer and self.options.backup == "proximal"
        V_h, V_hh = (k, K) if same else dense_backup(self.options.backup, V_h, V_hh, D)
        both = maps.pull(torch.cat([V_h[..., None], V_hh], -1))
        # Its rounding is made symmetric behind the activation, once a layer.
        return policy, (both[..., 0], maps.pull(both[..., 1:].mT))


class _MatrixPolicy(Policy):
    """d_t = sum_i (V_h + V_hh g_x dx)_u."""

    def __init__(self, options: Dense, V_h: Tensor, V_hh: Tensor) -> None:
        self.options, self.V_h, self.V_hh = options, V_h, V_hh

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors V_h - g + V_hh g_x dx."""
        V_h = self.V_h
        if dx is not None:
            feedback = torch.bmm(self.V_hh, maps.push(dx)[..., None])[..., 0]
            if self.options.clip is not None:
                norms = torch.linalg.vector_norm(torch.stack([feedback, V_h]), dim=-1)
                feedback = feedback * clip_factor(self.options.clip, *norms)[:, None]
            V_h = V_h + feedback
        return maps.split(V_h - maps.gradient())
