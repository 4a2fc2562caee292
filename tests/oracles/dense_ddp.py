# SPDX-License-Identifier: MIT
"""A dense differential-dynamic-programming step in float64 with explicit Jacobians.

Everything is formed that an efficient implementation avoids: per sample the Jacobians g_x, g_u,
sigma_h over all parameters, V_xx (X by X), and the Q terms
of the paper's equations 2 to 5 in u-space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from oracles.flat import Chain, Inner, apply, flat_parameters


@dataclass
class _Stage:
    """One layer's linearisation and policy: all tensors per sample (b first) but u, p, m."""

    u: Tensor
    x: Tensor
    g_x: Tensor
    g_u: Tensor
    gain: Tensor  # P = eta M^-1, a vector
    m: Tensor
    v_h: Tensor
    v_hh: Tensor
    plain: Tensor  # batch gradient of the plain loss


class DenseDDP:
    """Repeated DDP steps of a chain.

    Args:
        model: The chain; its parameters are copied, never changed.
        inner: The borrowed optimizer.
        backup: "riccati", "closed_loop" or "proximal".
        own_layer: Whether the policy's Q_uu contains the layer's own f_u^T V_xx f_u.
        clip: Bound of the feedback relative to the open-loop term, per sample in h-space.
        regularization: eps added to V_xx's diagonal after the pull-back.
        weight_decay: Coupled decay.
        second_moment: "batch" or "per_sample".
        statistics: "value" (M from Q_u) or "plain" (M from the loss gradient).
        plain: Indices of layers that take the borrowed optimizer's step: no control to back up.
    """

    def __init__(
        self,
        model: Chain,
        inner: Inner,
        *,
        backup: str = "proximal",
        own_layer: bool = False,
        clip: float | None = None,
        regularization: float = 0.0,
        weight_decay: float = 0.0,
        second_moment: str = "batch",
        statistics: str = "value",
        plain: tuple[int, ...] = (),
    ) -> None:
        """Copy the parameters."""
        self.model, self.inner, self.backup = model, inner, backup
        self.own_layer, self.clip, self.regularization = own_layer, clip, regularization
        self.weight_decay, self.second_moment = weight_decay, second_moment
        self.statistics, self.plain = statistics, plain
        self.params = [u.clone() for u in flat_parameters(model)]

    def step(
        self,
        x: Tensor,
        loss: Callable[[Tensor], Tensor],
        hessian: Callable[[Tensor], Tensor],
    ) -> None:
        """One step.

        Args:
            x: Inputs, batch first.
            loss: The scalar loss of the output.
            hessian: Output (B, C) -> per-sample Hessians (B, C, C), in the units of ``loss``.
        """
        states = [x]
        for t, layer in enumerate(self.model.layers):
            states.append(self.model.after[t](apply(layer, self.params[t], states[t])))
        z = states[-1].detach().requires_grad_()
        v_x = torch.autograd.grad(loss(z), z)[0].flatten(1)
        v_xx = hessian(z.detach())
        plain, stages = v_x, []
        for t in reversed(range(len(self.model.layers))):
            stage, v_x, v_xx, plain = self._backward(t, states[t], v_x, v_xx, plain)
            stages.append(stage)
        self._rollout(x, stages[::-1])

    def _backward(
        self, t: int, x: Tensor, v_x: Tensor, v_xx: Tensor, plain: Tensor
    ) -> tuple[_Stage, Tensor, Tensor, Tensor]:
        layer, after, u = self.model.layers[t], self.model.after[t], self.params[t]
        b = len(x)

        def g(u: Tensor, x: Tensor) -> Tensor:
            return apply(layer, u, x[None])[0]

        h = apply(layer, u, x)
        sigma_h = vmap(jacrev(lambda h: after(h[None])[0].reshape(-1)))(h).flatten(2)
        g_x = vmap(jacrev(g, 1), (None, 0))(u, x).reshape(b, h[0].numel(), -1)
        g_u = vmap(jacrev(g, 0), (None, 0))(u, x).reshape(b, h[0].numel(), -1)
        v_h = torch.einsum("bjh,bj->bh", sigma_h, v_x)
        v_hh = torch.einsum("bjh,bjk,bkl->bhl", sigma_h, v_xx, sigma_h)
        plain_h = torch.einsum("bjh,bj->bh", sigma_h, plain)
        q_u = torch.einsum("bhu,bh->bu", g_u, v_h)
        plain_u = torch.einsum("bhu,bh->bu", g_u, plain_h)
        from_loss = self.statistics == "plain" or t in self.plain
        m = self._curvature(t, u, plain_u if from_loss else q_u)
        p = self.inner.gain / m
        q_x, q_xx = g_x.mT @ v_h[..., None], g_x.mT @ v_hh @ g_x
        q_ux, q_uu = g_u.mT @ v_hh @ g_x, g_u.mT @ v_hh @ g_u
        k, gain = self._optimal(p, q_uu, q_u[..., None], q_ux)
        if t in self.plain:
            k, gain = torch.zeros_like(k), torch.zeros_like(gain)
        new_x = q_x + q_ux.mT @ k
        new_xx = q_xx + q_ux.mT @ gain
        if self.backup == "closed_loop":  # value of the policy, without the proximity cost
            new_x = new_x + gain.mT @ (q_u[..., None] + q_uu @ k)
            new_xx = new_xx + gain.mT @ (q_ux + q_uu @ gain)
        new_xx = new_xx + self.regularization * torch.eye(new_xx.shape[-1], dtype=u.dtype)
        new_plain = torch.einsum("bhx,bh->bx", g_x, plain_h)
        stage = _Stage(u, x, g_x, g_u, p, m, v_h, v_hh, plain_u.sum(0))
        return stage, new_x[..., 0], new_xx, new_plain

    def _optimal(self, p: Tensor, q_uu: Tensor, q_u: Tensor, q_ux: Tensor) -> tuple[Tensor, Tensor]:
        """k and K of equation 4 with the Q_uu that belongs to the backup."""
        if self.backup == "proximal":
            full = torch.diag(1 / p) + q_uu
            return -torch.linalg.solve(full, q_u), -torch.linalg.solve(full, q_ux)
        return -p[:, None] * q_u, -p[:, None] * q_ux

    def _curvature(self, t: int, u: Tensor, q_u: Tensor) -> Tensor:
        decay = self.weight_decay * u
        if self.second_moment == "per_sample":  # of the plain loss: V carries 1/B
            square = ((len(q_u) * q_u + decay) ** 2).mean(0)
        else:
            square = (q_u.sum(0) + decay) ** 2
        v = self.inner.moment(t, square)
        if self.statistics == "value":
            self.inner.v[t] = v
        return self.inner.diagonal(v)

    def _rollout(self, x: Tensor, stages: list[_Stage]) -> None:
        new = x
        for t, stage in enumerate(stages):
            dx = (new - stage.x).flatten(1)
            base = stage.v_h
            feedback = torch.einsum("bhk,bkx,bx->bh", stage.v_hh, stage.g_x, dx)
            if self.own_layer:  # du = -(M/eta + Q_uu)^-1 (Q_u + Q_ux dx), read back in h-space
                d_h = (stage.g_u * stage.gain) @ stage.g_u.mT
                own = torch.eye(d_h.shape[-1], dtype=x.dtype) + stage.v_hh @ d_h
                base = torch.linalg.solve(own, base)
                feedback = torch.linalg.solve(own, feedback)
            if self.clip is not None:
                bound = self.clip * base.norm(dim=1) / feedback.norm(dim=1)
                feedback = feedback * torch.nan_to_num(bound, nan=1.0).clamp(max=1.0)[:, None]
            decay = self.weight_decay * stage.u
            if t in self.plain:
                d = stage.plain + decay
                self.params[t] = self.inner.update(t, stage.u, d, stage.m)
                new = self.model.after[t](apply(self.model.layers[t], self.params[t], new))
                continue
            d = torch.einsum("bhu,bh->u", stage.g_u, base + feedback) + decay
            m = stage.m
            if self.statistics == "plain":
                square = torch.maximum((stage.plain + decay) ** 2, d**2)
                self.inner.v[t] = self.inner.moment(t, square)
                m = self.inner.diagonal(self.inner.v[t])
            self.params[t] = self.inner.update(t, stage.u, d, m)
            new = self.model.after[t](apply(self.model.layers[t], self.params[t], new))
