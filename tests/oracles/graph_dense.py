# SPDX-License-Identifier: MIT
"""Differential dynamic programming on a net's explicit augmented state, everything formed.

Per sample V_xx is an X by X matrix over all live tensors (and moved weights that are used again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.flat import Inner
from oracles.graph import GraphOracle, Net, System


@dataclass
class _Policy:
    """d = sum_i M / gain (solver)^-1 (Q_u + Q_ux dx), per sample."""

    u: Tensor
    gain: Tensor  # P = eta M^-1, a vector
    m: Tensor
    q_u: Tensor
    q_ux: Tensor
    solver: Tensor  # Q_uu of the policy


class DenseGraph(GraphOracle):
    """Repeated quadratic steps.

    Args:
        net: The net.
        inner: The borrowed optimizer.
        backup: "riccati", "closed_loop" or "proximal".
        own_layer: Whether the policy's Q_uu contains f_u^T V_xx f_u.
        feedback: False: dx = 0 in every policy.
    """

    def __init__(
        self,
        net: Net,
        inner: Inner,
        *,
        backup: str = "proximal",
        own_layer: bool = False,
        feedback: bool = True,
    ) -> None:
        super().__init__(net, inner)
        self.backup, self.own_layer, self.feedback = backup, own_layer, feedback
        self.policies: dict[int, _Policy] = {}
        #: (V_x, V_xx) at every cut, the output last.
        self.values: list[tuple[Tensor, Tensor]] = []

    def step(
        self,
        inputs: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        hessian: Callable[[Tensor], Tensor],
    ) -> System:
        """One step; the system at the old weights is returned.

        Args:
            inputs: The net's arguments.
            loss: The scalar loss of the output (B, C).
            hessian: Output to per-sample Hessians (B, C, C), in the units of ``loss``.
        """
        system, self.loss = System(self.net, self.weights, inputs), loss
        z = system.states[-1].detach().requires_grad_()
        V = torch.autograd.grad(loss(z), z)[0], hessian(z.detach())
        self.values = [V]
        for t in reversed(range(len(system.stages))):
            V = self._back(system, t, *V)
            self.values.insert(0, V)
        self.rollout(system, inputs)
        return system

    def _back(self, system: System, t: int, V_x: Tensor, V_xx: Tensor) -> tuple[Tensor, Tensor]:
        f_x, f_u = system.jacobians(t, t + 1)
        Q_x, Q_xx = f_x.mT @ V_x[..., None], f_x.mT @ V_xx @ f_x
        if f_u is None:
            return Q_x[..., 0], Q_xx
        Q_u, Q_ux, Q_uu = f_u.mT @ V_x[..., None], f_u.mT @ V_xx @ f_x, f_u.mT @ V_xx @ f_u
        self.inner.v[t] = self.inner.moment(t, Q_u.sum(0)[:, 0] ** 2)
        m = self.inner.diagonal(self.inner.v[t])
        proximity = torch.diag(m / self.inner.gain).expand_as(Q_uu)
        full = proximity + Q_uu
        solver = full if self.backup == "proximal" else proximity
        k, K = -torch.linalg.solve(solver, Q_u), -torch.linalg.solve(solver, Q_ux)
        new_x, new_xx = Q_x + Q_ux.mT @ k, Q_xx + Q_ux.mT @ K
        if self.backup == "closed_loop":  # value of the policy, without the proximity cost
            new_x = new_x + K.mT @ (Q_u + Q_uu @ k)
            new_xx = new_xx + K.mT @ (Q_ux + Q_uu @ K)
        u = self.weights[system.stages[t].owner]
        own = full if self.own_layer else proximity
        self.policies[t] = _Policy(u, self.inner.gain / m, m, Q_u, Q_ux, own)
        return new_x[..., 0], new_xx

    def policy(self, t: int, dx: Tensor) -> Tensor:
        """u with every sample's k + K dx, by the borrowed optimizer."""
        one = self.policies[t]
        if not self.feedback:
            dx = torch.zeros_like(dx)
        target = one.q_u + one.q_ux @ dx[..., None]
        d = torch.linalg.solve(one.solver, target)[..., 0].sum(0) / one.gain
        return self.inner.update(t, one.u, d, one.m)
