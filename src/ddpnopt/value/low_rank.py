# SPDX-License-Identifier: MIT
"""Terminal coordinates: V_xx = Z C Z^T, V_x = g - Z c, with r x r matrices per sample.

Z_t is the terminal Hessian's factor S pulled back by ordinary back-propagation; the Bellman
recursion is an r x r recursion. No X x X matrix is formed, and the result equals `Dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.ranges import check_number, count
from ddpnopt.typing import Tensor
from ddpnopt.value.backups import clip_factor, factor_backup, identity_like
from ddpnopt.value.base import Blocks, Maps, Policy, Recursion, TerminalCost
from ddpnopt.value.quadratic import Quadratic


@dataclass(frozen=True)
class LowRank(Quadratic):
    """The exact value function by a factor of the terminal Hessian.

    Args:
        rank: Columns kept. Softmax over C classes is exact with C - 1; fewer group the least
            likely classes into one, which never over-estimates the curvature. None: exact.
    """

    rank: int | None = None

    name: ClassVar[str] = "low_rank"
    linearization: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.rank is not None:
            bound = "must be a whole number, at least 1, or None for exact"
            check_number("LowRank", "rank", self.rank, count, bound)

    def start(self, terminal: TerminalCost) -> Recursion:
        """C = I, c = 0."""
        return _Coordinates(self)


class _Coordinates(Recursion):
    def __init__(self, options: LowRank) -> None:
        self.options = options
        self.C: Tensor | None = None
        self.c: Tensor | None = None

    def correction(self, maps: Maps) -> Blocks | None:
        """-Z c."""
        return None if self.c is None else maps.combine(None, -self.c)

    def back(self, maps: Maps, bottom: bool) -> Policy:
        """Backup with the Gram matrices of the columns [g, Z]."""
        gram = maps.gram()
        S, s = gram[:, 1:, 1:], gram[:, 1:, 0]
        if self.C is None or self.c is None:
            self.C, self.c = identity_like(S).contiguous(), torch.zeros_like(s)
        C, c, kind = self.C, self.c, self.options.backup
        own = factor_backup("proximal", C, c, S, s) if self.options.own_layer else (C, c)
        if not bottom:
            same = self.options.own_layer and kind == "proximal"
            self.C, self.c = own if same else factor_backup(kind, C, c, S, s)
        return _CoordinatePolicy(self.options, *own, gram[:, 0, 0])


class _CoordinatePolicy(Policy):
    """d_t = sum_i (g - Z c + Z C q)_u with q = Z_x . dx."""

    def __init__(self, options: LowRank, C: Tensor, c: Tensor, s: Tensor) -> None:
        self.options, self.C, self.c, self.S = options, C, c, s

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors Z (C q - c)."""
        b = -self.c
        if dx is not None:
            feedback = (self.C @ maps.project(dx)[..., None])[..., 0]
            if self.options.clip is not None:
                feedback = feedback * self._clip(maps, feedback)[:, None]
            b = b + feedback
        return maps.combine(None, b)

    def _clip(self, maps: Maps, feedback: Tensor) -> Tensor:
        """Both norms from the columns' inner products in h-space."""
        assert self.options.clip is not None
        N = maps.h_gram()
        forward = torch.cat([torch.ones_like(self.c[:, :1]), -self.c], dim=1)
        feedback = torch.cat([torch.zeros_like(self.c[:, :1]), feedback], dim=1)
        norms = [
            torch.einsum("br,brs,bs->b", v, N, v).clamp(min=0).sqrt() for v in (feedback, forward)
        ]
        return clip_factor(self.options.clip, *norms)
