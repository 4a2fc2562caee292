# SPDX-License-Identifier: MIT
"""Differential dynamic programming with every derivative of Q by automatic differentiation.

One time step is f_t(x, u), layer and activation together, of one sample or of the whole batch as
one augmented state. Q(x, u) = V'(f(x, u)) with V' quadratic; its blocks are formed in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.func import jacrev

from oracles.flat import Chain, apply, flat_parameters

Loss = Callable[[Tensor], Tensor]


@dataclass
class Policy:
    """k (U), K (U, X) and the nominal state of one system (a sample, or the batch) at one layer."""

    x: Tensor
    k: Tensor
    K: Tensor
    V_x: Tensor
    V_xx: Tensor


class FullQ:
    """DDP steps of a chain with M = I.

    Args:
        model: The chain; its parameters are copied.
        lr: eta.
        second: Second-order dynamics.
        joint: The batch is one augmented state.
        kind: "proximal", "riccati" or "closed_loop".
        own_layer: The policy's Q_uu is M / eta + Q_uu; else M / eta.
        regularization: Added to the diagonal of V_xx at every state.
    """

    def __init__(
        self,
        model: Chain,
        lr: float,
        *,
        second: bool = False,
        joint: bool = False,
        kind: str = "proximal",
        own_layer: bool = False,
        regularization: float = 0.0,
    ) -> None:
        self.model, self.lr, self.second, self.joint = model, lr, second, joint
        self.kind, self.own_layer, self.regularization = kind, own_layer, regularization
        self.params = [u.clone() for u in flat_parameters(model)]
        self.policies: list[list[Policy]] = []

    def f(self, t: int, u: Tensor, x: Tensor) -> Tensor:
        """The step of a batch."""
        return self.model.after[t](apply(self.model.layers[t], u, x))

    def states(self, x: Tensor) -> list[Tensor]:
        """The nominal states."""
        found = [x]
        for t, u in enumerate(self.params):
            found.append(self.f(t, u, found[-1]))
        return found

    def sweep(self, x: Tensor, loss: Loss, hessian_of: Loss) -> None:
        """The backward pass; sets `policies` [layer][system]."""
        states = self.states(x)
        z = states[-1].detach().requires_grad_()
        g = torch.autograd.grad(loss(z), z)[0]
        H = hessian_of(z.detach()).reshape(len(x), g[0].numel(), g[0].numel())
        if self.joint:
            values = [(g.reshape(-1), torch.block_diag(*H))]
            groups = [slice(0, len(x))]
        else:
            values = [(g[i].reshape(-1), H[i]) for i in range(len(x))]
            groups = [slice(i, i + 1) for i in range(len(x))]
        self.policies = []
        for t in reversed(range(len(self.params))):
            found = [
                self._back(t, states[t][group], *V) for group, V in zip(groups, values, strict=True)
            ]
            self.policies.insert(0, [policy for policy, _ in found])
            values = [V for _, V in found]

    def _back(
        self, t: int, x: Tensor, V_x: Tensor, V_xx: Tensor
    ) -> tuple[Policy, tuple[Tensor, Tensor]]:
        def f(state: Tensor, u: Tensor) -> Tensor:
            return self.f(t, u, state.reshape(x.shape)).reshape(-1)

        at = x.reshape(-1), self.params[t]
        f_x, f_u = jacrev(f, 0)(*at), jacrev(f, 1)(*at)
        Q_x, Q_u = f_x.T @ V_x, f_u.T @ V_x
        Q_xx, Q_ux, Q_uu = f_x.T @ V_xx @ f_x, f_u.T @ V_xx @ f_x, f_u.T @ V_xx @ f_u
        if self.second:
            # Reverse over reverse: forward over reverse is wrong for torch's layer_norm.
            (xx, _), (ux, uu) = hessian(lambda s, u: V_x @ f(s, u), at)
            Q_xx, Q_ux, Q_uu = Q_xx + xx, Q_ux + ux, Q_uu + uu
        prox = torch.eye(len(Q_u), dtype=Q_u.dtype) / self.lr
        solver = prox + Q_uu if self.kind == "proximal" else prox
        k, K = -torch.linalg.solve(solver, Q_u), -torch.linalg.solve(solver, Q_ux)
        new_x, new_xx = Q_x + Q_ux.T @ k, Q_xx + Q_ux.T @ K
        if self.kind == "closed_loop":
            new_x = new_x + K.T @ (Q_u + Q_uu @ k)
            new_xx = new_xx + K.T @ (Q_ux + Q_uu @ K)
        new_xx = new_xx + self.regularization * torch.eye(len(new_x), dtype=Q_u.dtype)
        own = prox + Q_uu if self.own_layer else prox
        k, K = -torch.linalg.solve(own, Q_u), -torch.linalg.solve(own, Q_ux)
        return Policy(x, k, K, new_x, new_xx), (new_x, new_xx)

    def rollout(self, x: Tensor, alpha: float = 1.0) -> list[Tensor]:
        """The new parameters, with the feedforward scaled by alpha."""
        new, params = x, []
        for t, policies in enumerate(self.policies):
            u, at = self.params[t].clone(), 0
            for one in policies:
                dx = (new[at : at + len(one.x)] - one.x).reshape(-1)
                u = u + alpha * one.k + one.K @ dx
                at += len(one.x)
            params.append(u)
            new = self.f(t, u, new)
        return params

    def step(self, x: Tensor, loss: Loss, hessian_of: Loss) -> None:
        """One step."""
        self.sweep(x, loss, hessian_of)
        self.params = self.rollout(x)
