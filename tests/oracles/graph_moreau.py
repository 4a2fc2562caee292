# SPDX-License-Identifier: MIT
"""Steps of the Moreau rule on a net's explicit augmented state, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oracles.flat import Inner
from oracles.graph import GraphOracle, Net, System
from oracles.moreau_scalar import LineModel, flow_coefficient, implicit_coefficient


class MoreauGraph(GraphOracle):
    """Repeated steps.

    Args:
        net: The net.
        inner: The borrowed optimizer.
        own_layer: Whether S_t contains the layer's own s_t.
        coupling: Whether s_k is multiplied by rho_k.
        strength: The factor on S of the envelope. None: the flow of logistic lines.
        feedback: False: q = 0 in every coefficient.
    """

    def __init__(
        self,
        net: Net,
        inner: Inner,
        *,
        own_layer: bool = True,
        coupling: bool = True,
        strength: float | None = None,
        feedback: bool = True,
    ) -> None:
        super().__init__(net, inner)
        self.own_layer, self.coupling, self.strength = own_layer, coupling, strength
        self.feedback = feedback
        #: Coefficients (B) of the last step, by stage.
        self.coefficients: dict[int, Tensor] = {}

    def step(
        self,
        inputs: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        w: Tensor,
        lines: Callable[[Tensor], list[LineModel]],
    ) -> System:
        """One step; the system at the old weights is returned.

        Args:
            inputs: The net's arguments.
            loss: Scalar loss of the output (B, C).
            w: w_i, the factor of sample i's plain loss in ``loss``.
            lines: Output to each sample's line model (of its plain loss).
        """
        system, self.loss = System(self.net, self.weights, inputs), loss
        z = system.states[-1].detach().requires_grad_()
        G_z = torch.autograd.grad(loss(z), z)[0]
        self.w, self.lines, self.flat = w, lines(z.detach()), G_z.abs().amax(1) == 0
        end = len(system.stages)
        self.G_x: dict[int, Tensor] = {}
        self.G_u: dict[int, Tensor] = {}
        self.s: dict[int, Tensor] = {}
        for t in range(end):
            z_x, z_u = system.jacobians(t, end)
            self.G_x[t] = torch.einsum("bcx,bc->bx", z_x, G_z)
            if z_u is not None:  # the sum over executions: the net's derivative in u
                self.G_u[t] = torch.einsum("bcu,bc->bu", z_u, G_z)
                self.s[t] = self._own(t)
        self.system = system
        self.rollout(system, inputs)
        return system

    def _own(self, t: int) -> Tensor:
        """rho_t s_t of every sample."""
        rows = self.G_u[t]
        P = self.inner.gain / self.inner.diagonal(self.inner.moment(t, rows.sum(0) ** 2))
        own = (rows**2 * P).sum(1)
        rho = 1.0
        if self.coupling and float(own.sum()) > 0:
            together = float((rows.sum(0) ** 2 * P).sum() / own.sum())
            rho = min(max(together, 1.0), float(len(rows)))
        strength = 1.0 if self.strength is None else self.strength
        return strength * rho * own / self.w

    def policy(self, t: int, dx: Tensor) -> Tensor:
        """u with d = sum_i coef_i G_u,i, by the borrowed optimizer."""
        S = sum(
            (s for k, s in self.s.items() if k > t or (k == t and self.own_layer)),
            torch.zeros_like(self.w),
        )
        q = (self.G_x[t] * dx).sum(1) / self.w
        if not self.feedback:
            q = torch.zeros_like(q)
        found = [self._coefficient(i, float(S[i]), float(q[i])) for i in range(len(q))]
        self.coefficients[t] = q.new_tensor(found)
        rows = self.G_u[t]
        d = self.coefficients[t] @ rows
        square = torch.maximum(rows.sum(0) ** 2, d**2)
        self.inner.v[t] = self.inner.moment(t, square)
        m = self.inner.diagonal(self.inner.v[t])
        return self.inner.update(t, self.weights[self.system.stages[t].owner], d, m)

    def _coefficient(self, i: int, S: float, q: float) -> float:
        if self.flat[i]:
            return 1.0
        line = self.lines[i]
        flows = self.strength is None and line.excess is not None and S > 0
        return (flow_coefficient if flows else implicit_coefficient)(line, S, q)
