# SPDX-License-Identifier: MIT
"""Explicit V_x (X) and V_xx (X x X) per sample: the paper's form, and an oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.typing import Tensor
from ddpnopt.value.backups import clip_factor, dense_backup, identity_like, symmetric
from ddpnopt.value.base import Blocks, Maps, Policy, Recursion, TerminalCost
from ddpnopt.value.quadratic import Quadratic


@dataclass(frozen=True)
class Dense(Quadratic):
    """The full value function; memory B X^2 a layer.

    Args:
        regularization: eps_Vxx, V_xx + eps I after every pull-back to a state (Algorithm 3), in
            the units of the loss that autograd sees (which carries 1/B for a mean).
    """

    regularization: float | int = 0.0

    name: ClassVar[str] = "dense"
    linearization: ClassVar[str] = "jacobian"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not self.regularization >= 0:
            raise ValueError(f"Dense(regularization={self.regularization}): must not be negative")

    def start(self, terminal: TerminalCost) -> Recursion:
        """V_h = g and V_hh = S S^T at the output."""
        return _Matrices(self, terminal.hessian_factor())


class _Matrices(Recursion):
    def __init__(self, options: Dense, factor: Tensor) -> None:
        self.options = options
        self.factor = factor
        self.V: tuple[Tensor, Tensor] | None = None
        self.at: tuple[Maps, Tensor, Tensor] | None = None

    def _here(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """(V_h, V_hh) of this layer: V' through the activation (eq. 12)."""
        if self.at is not None and self.at[0] is maps:
            return self.at[1:]
        if self.V is None:
            V_h, V_hh = maps.gradient(), maps.through(self.factor)
            V_hh = V_hh @ V_hh.transpose(-1, -2)
        else:
            V_x, V_xx = self.V
            V_h = maps.through(V_x[..., None])[..., 0]
            V_hh = symmetric(maps.through(maps.through(V_xx).transpose(-1, -2)))
        self.at = (maps, V_h, V_hh)
        return V_h, V_hh

    def correction(self, maps: Maps) -> Blocks | None:
        """V_h - g."""
        V_h, _ = self._here(maps)
        return maps.split(V_h - maps.gradient())

    def back(self, maps: Maps, bottom: bool) -> Policy:
        """Backup in h-space, pull-back by g_x (eq. 13), Tikhonov."""
        V_h, V_hh = self._here(maps)
        D = maps.curvature()
        k, K = V_h, V_hh
        if self.options.own_layer:
            k, K = dense_backup("proximal", V_h, V_hh, D)
        self.at = None
        if bottom:
            return _MatrixPolicy(self.options, k, K)
        V_h, V_hh = dense_backup(self.options.backup, V_h, V_hh, D)
        V_x = maps.pull(V_h[..., None])[..., 0]
        V_xx = symmetric(maps.pull(maps.pull(V_hh).transpose(-1, -2)))
        self.V = V_x, V_xx + self.options.regularization * identity_like(V_xx)
        return _MatrixPolicy(self.options, k, K)


class _MatrixPolicy(Policy):
    """d_t = sum_i (V_h + V_hh g_x dx)_u."""

    def __init__(self, options: Dense, V_h: Tensor, V_hh: Tensor) -> None:
        self.options, self.V_h, self.V_hh = options, V_h, V_hh

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors V_h - g + V_hh g_x dx."""
        V_h = self.V_h
        if dx is not None:
            feedback = (self.V_hh @ maps.push(dx)[..., None])[..., 0]
            if self.options.clip is not None:
                norms = torch.linalg.vector_norm(torch.stack([feedback, V_h]), dim=-1)
                feedback = feedback * clip_factor(self.options.clip, *norms)[:, None]
            V_h = V_h + feedback
        return maps.split(V_h - maps.gradient())
