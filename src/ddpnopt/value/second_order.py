# SPDX-License-Identifier: MIT
"""Bellman's recursion with the second derivatives of the dynamics, f_xx, f_ux and f_uu.

Through the activation V_hh gets V'_x . sigma_hh (`Explicit`). Through the layer h = g(x, u)

    Q_xx = g_x^T V_hh g_x + V_h . g_xx      Q_ux = g_u^T V_hh g_x + V_h . g_ux
    Q_uu = M / eta + g_u^T V_hh g_u                             (g is linear in the control)

per sample, each contracted with V_h at once: no third-order tensor is formed, but Q_ux is (U, X).
"""

from __future__ import annotations

import torch

from ddpnopt.typing import Tensor
from ddpnopt.value.backups import clip_factor, identity_like, solve, symmetric
from ddpnopt.value.base import Blocks, Maps, Policy
from ddpnopt.value.explicit import Explicit


class SecondOrder(Explicit):
    """The recursion of `Dense(dynamics="second_order")`.

    Args:
        factor: (B, Z, r) of the terminal Hessian.
        regularization: eps_Vxx.
        kind: Which backup.
        own_layer: The policy's Q_uu contains the layer's own g_u^T V_hh g_u.
        clip: Bound of the feedback, or None.
    """

    def __init__(
        self, factor: Tensor, regularization: float, kind: str, own_layer: bool, clip: float | None
    ) -> None:
        super().__init__(factor, regularization, second_order=True)
        self.kind, self.own_layer, self.clip = kind, own_layer, clip

    def backup(
        self, maps: Maps, V_h: Tensor, V_hh: Tensor, bottom: bool
    ) -> tuple[Policy, tuple[Tensor, Tensor] | None]:
        """Q's blocks as matrices, k and K, and what they leave (eq. 3 to 5)."""
        F, mixed = maps.matrices.control(), maps.matrices.mixed(V_h)
        PF = maps.matrices.precondition(F)
        D = F.mT @ PF
        policy = _SecondOrderPolicy(self, V_h, V_hh, D, PF.mT @ mixed)
        if bottom:
            return policy, None
        g_x = maps.matrices.state_map()
        Q_u, Q_ux = (F @ V_h[..., None]), F @ V_hh @ g_x + mixed
        Q_x, Q_xx = g_x.mT @ V_h[..., None], g_x.mT @ V_hh @ g_x
        bent = maps.matrices.state_curvature(V_h)
        Q_xx = Q_xx if bent is None else Q_xx + bent
        both = torch.cat([Q_u, Q_ux], -1)
        step = maps.matrices.precondition(both)
        if self.kind == "proximal":  # Woodbury: Q_uu^-1 = P - P F (I + V_hh D)^-1 V_hh F^T P
            R = solve(identity_like(D) + V_hh @ D, V_hh)
            step = step - PF @ (R @ (F.mT @ step))
        k, K = -step[..., :1], -step[..., 1:]
        V_x, V_xx = Q_x + Q_ux.mT @ k, Q_xx + Q_ux.mT @ K
        if self.kind == "closed_loop":  # value of the policy, without the proximity cost
            Fk, FK = F.mT @ k, F.mT @ K
            V_x = V_x + K.mT @ Q_u + FK.mT @ V_hh @ Fk
            V_xx = V_xx + K.mT @ Q_ux + FK.mT @ V_hh @ FK
        return policy, (V_x[..., 0], symmetric(V_xx))


class _SecondOrderPolicy(Policy):
    """d_t = sum_i (V_h + V_hh g_x dx)_u + (V_h . g_ux) dx, the latter by `bend`."""

    def __init__(
        self, options: SecondOrder, V_h: Tensor, V_hh: Tensor, D: Tensor, mixed_h: Tensor
    ) -> None:
        self.options, self.V_h, self.V_hh = options, V_h, V_hh
        self.base, self.gain, self.mixed_h = V_h, V_hh, None
        if options.own_layer:  # Q_uu^-1 (F a + m) = P (F (a - R (D a + F^T P m)) + m)
            both = torch.cat([V_h[..., None], V_hh], -1)
            both = solve(identity_like(D) + V_hh @ D, both)
            self.base, self.gain = both[..., 0], both[..., 1:]
            self.mixed_h = self.gain @ mixed_h

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space part."""
        v = self.base
        if dx is not None:
            feedback = self._feedback(maps, dx)
            v = v + self._share(feedback) * feedback
        return maps.split(v - maps.gradient())

    def bend(self, maps: Maps, dx: Blocks) -> Blocks:
        """The vectors whose pull-back to the control is taken at dx in place of the state."""
        return maps.split(self._share(self._feedback(maps, dx)) * self.V_h)

    def _feedback(self, maps: Maps, dx: Blocks) -> Tensor:
        feedback = (self.gain @ maps.push(dx)[..., None])[..., 0]
        if self.mixed_h is None:
            return feedback
        return feedback - (self.mixed_h @ maps.matrices.state(dx)[..., None])[..., 0]

    def _share(self, feedback: Tensor) -> Tensor:
        if self.options.clip is None:
            return torch.ones_like(feedback[:, :1])
        norms = torch.linalg.vector_norm(torch.stack([feedback, self.base]), dim=-1)
        return clip_factor(self.options.clip, *norms)[:, None]
