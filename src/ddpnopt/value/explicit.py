# SPDX-License-Identifier: MIT
"""V_x and V_xx as explicit matrices on their way from one layer's state to the layer before it."""

from __future__ import annotations

from abc import abstractmethod

import torch

from ddpnopt.typing import Tensor
from ddpnopt.value.backups import symmetric
from ddpnopt.value.base import Blocks, Maps, Policy, Recursion


class Explicit(Recursion):
    """The recursion's state; a subclass backs up through a layer.

    Args:
        factor: (B, Z, r) of the terminal Hessian.
        regularization: eps_Vxx.
        second_order: V_hh contains V'_x . sigma_hh, the activation's own curvature.
    """

    def __init__(self, factor: Tensor, regularization: float, second_order: bool = False) -> None:
        self.factor, self.regularization, self.second_order = factor, regularization, second_order
        self.V: tuple[Tensor, Tensor] | None = None
        self.at: tuple[Maps, Tensor, Tensor] | None = None

    def here(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """(V_h, V_hh) of this layer: V' through the activation (eq. 12)."""
        if self.at is not None and self.at[0] is maps:
            return self.at[1:]
        if self.V is None:
            V_h, V_hh = maps.gradient(), maps.through(self.factor)
            V_hh = V_hh @ V_hh.mT
        else:
            V_x, V_xx = self.V
            both = maps.through(torch.cat([V_x[..., None], V_xx], -1))
            V_h, V_hh = both[..., 0], symmetric(maps.through(both[..., 1:].mT))
            if self.second_order:
                V_hh = V_hh + maps.matrices.segment_curvature(V_x)
        self.at = (maps, V_h, V_hh)
        return V_h, V_hh

    def correction(self, maps: Maps) -> Blocks | None:
        """V_h - g."""
        V_h, _ = self.here(maps)
        return maps.split(V_h - maps.gradient())

    def back(self, maps: Maps, bottom: bool) -> Policy:
        """The layer's policy, its backup, Tikhonov."""
        V_h, V_hh = self.here(maps)
        policy, backup = self.backup(maps, V_h, V_hh, bottom)
        self.at = None
        if backup is not None:
            V_x, V_xx = backup
            if self.regularization:
                V_xx = V_xx.clone()
                V_xx.diagonal(dim1=-2, dim2=-1).add_(self.regularization)
            self.V = V_x, V_xx
        return policy

    @abstractmethod
    def backup(
        self, maps: Maps, V_h: Tensor, V_hh: Tensor, bottom: bool
    ) -> tuple[Policy, tuple[Tensor, Tensor] | None]:
        """The policy, and (V_x, V_xx) at the layer's state; None at the bottom."""
