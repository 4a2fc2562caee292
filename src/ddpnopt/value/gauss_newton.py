# SPDX-License-Identifier: MIT
"""Outer-product value function, V_xx = beta g g^T (Prop. 3): two scalars a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.ranges import check_switch
from ddpnopt.typing import Tensor
from ddpnopt.value.backups import clip_factor, scalar_backup
from ddpnopt.value.base import Blocks, Maps, Policy, Recursion, TerminalCost
from ddpnopt.value.quadratic import Quadratic


@dataclass(frozen=True)
class GaussNewton(Quadratic):
    """Gauss-Newton factorisation along the output's gradient.

    Args:
        match_curvature: Scale g g^T to the terminal cost's true curvature along g (the plain
            outer product over-estimates softmax about nine times early in training).
    """

    match_curvature: bool = True

    name: ClassVar[str] = "gauss_newton"
    linearization: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_switch("GaussNewton", "match_curvature", self.match_curvature)

    def start(self, terminal: TerminalCost) -> Recursion:
        """alpha = 1; phi_xx = w kappa g g^T of the plain gradient g = G / w."""
        kappa = terminal.kappa if self.match_curvature else torch.ones_like(terminal.w)
        return _Scalars(self, kappa / terminal.w)


class _Scalars(Recursion):
    def __init__(self, options: GaussNewton, beta: Tensor) -> None:
        self.options, self.alpha, self.beta = options, torch.ones_like(beta), beta

    def correction(self, maps: Maps) -> Blocks | None:
        """(alpha - 1) g."""
        return maps.combine(self.alpha - 1, None)

    def back(self, maps: Maps, bottom: bool) -> Policy:
        """Rank-1 backup."""
        s = maps.lengths()
        own = 1 + self.beta * s if self.options.own_layer else torch.ones_like(s)
        policy = _ScalarPolicy(self.options, self.alpha / own, self.beta / own, s)
        self.alpha, self.beta = scalar_backup(self.options.backup, self.alpha, self.beta, s)
        return policy


class _ScalarPolicy(Policy):
    """d_t = sum_i (alpha + beta q) g_u,i with q = g_x . dx."""

    def __init__(self, options: GaussNewton, alpha: Tensor, beta: Tensor, s: Tensor) -> None:
        self.options, self.alpha, self.beta, self.S = options, alpha, beta, s

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors (alpha + beta q - 1) g."""
        self.coefficient = self.alpha
        if dx is not None:
            feedback = self.beta * maps.project(dx)[:, 0]
            if self.options.clip is not None:
                feedback = feedback * clip_factor(
                    self.options.clip, feedback.abs(), self.alpha.abs()
                )
            self.coefficient = self.alpha + feedback
        return maps.combine(self.coefficient - 1, None)
