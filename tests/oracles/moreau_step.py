# SPDX-License-Identifier: MIT
"""A whole step of the Moreau rule on a chain, written sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oracles.flat import Chain, Inner, apply, flat_parameters
from oracles.moreau_scalar import LineModel, flow_coefficient, implicit_coefficient


class MoreauStep:
    """Repeated steps of the rule.

    Args:
        model: The chain; its parameters are copied, never changed.
        inner: The borrowed optimizer.
        own_layer: Whether S_t contains the layer's own s_t.
        coupling: Whether s_k is multiplied by rho_k.
        strength: The factor on S of the envelope; None: the flow of logistic lines.
        weight_decay: Coupled decay.
        feedback: False: q = 0 in every coefficient.
        plain: Indices of layers that take the borrowed optimizer's step, with no part in S.
    """

    def __init__(
        self,
        model: Chain,
        inner: Inner,
        *,
        own_layer: bool = True,
        coupling: bool = True,
        strength: float | None = None,
        weight_decay: float = 0.0,
        feedback: bool = True,
        plain: tuple[int, ...] = (),
    ) -> None:
        """Copy the parameters."""
        self.model, self.inner = model, inner
        self.own_layer, self.coupling, self.strength = own_layer, coupling, strength
        self.weight_decay, self.feedback, self.plain = weight_decay, feedback, plain
        self.params = [u.clone() for u in flat_parameters(model)]

    def step(
        self,
        x: Tensor,
        loss: Callable[[Tensor], Tensor],
        weights: Tensor,
        lines: Callable[[Tensor], list[LineModel]],
    ) -> list[list[float]]:
        """One step; the coefficients of every layer and sample are returned.

        Args:
            x: Inputs, batch first.
            loss: Scalar loss of the output.
            weights: w_i, the factor of sample i's plain loss in ``loss``.
            lines: Output -> each sample's line model (of its plain loss).
        """
        states, grads, z = self._gradients(x, loss)
        models = lines(z)
        depth, batch = len(self.params), len(x)
        rows = [self._rows(t, states[t], grads[t][1]) for t in range(depth)]  # G_u, (B, U)
        gain, s = [], []
        for t in range(depth):
            total = rows[t].sum(0) + self.weight_decay * self.params[t]
            m = self.inner.diagonal(self.inner.moment(t, total**2))
            p = self.inner.gain / m
            own = (rows[t] ** 2 * p).sum(1)  # w_i s_i
            gbar = rows[t].sum(0)
            rho = float(((gbar**2 * p).sum() / own.sum()).clamp(1, batch)) if self.coupling else 1.0
            gain.append(p)
            factor = 1.0 if self.strength is None else self.strength
            s.append(factor * rho * own / weights.clamp(min=1e-300))
        coefficients, new = [], x
        for t in range(depth):
            above = range(t if self.own_layer else t + 1, depth)
            reach = [k for k in above if k not in self.plain]
            total = sum((s[k] for k in reach), torch.zeros(batch, dtype=x.dtype))
            dx = (new - states[t]).flatten(1)
            q = (grads[t][0].flatten(1) * dx).sum(1) / weights.clamp(min=1e-300)
            if not self.feedback:
                q = torch.zeros_like(q)
            row = [
                self._coefficient(models[i], float(total[i]), float(q[i]))
                if rows[-1][i].abs().max() > 0 and t not in self.plain
                else 1.0
                for i in range(batch)
            ]
            coefficients.append(row)
            self._update(t, rows[t], torch.tensor(row, dtype=x.dtype))
            new = self.model.after[t](apply(self.model.layers[t], self.params[t], new))
        return coefficients

    def _coefficient(self, line: LineModel, total: float, q: float) -> float:
        flows = self.strength is None and line.excess is not None and total > 0
        return (flow_coefficient if flows else implicit_coefficient)(line, total, q)

    def _update(self, t: int, rows: Tensor, coefficient: Tensor) -> None:
        decay = self.weight_decay * self.params[t]
        d = coefficient @ rows + decay
        square = torch.maximum((rows.sum(0) + decay) ** 2, d**2)
        self.inner.v[t] = self.inner.moment(t, square)
        m = self.inner.diagonal(self.inner.v[t])
        self.params[t] = self.inner.update(t, self.params[t], d, m)

    def _gradients(
        self, x: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Tensor]:
        """Nominal states, and for each layer the gradients of the loss at its input and at h."""
        inputs, hs = [], []
        x = x.detach().clone().requires_grad_()
        for t, layer in enumerate(self.model.layers):
            inputs.append(x)
            hs.append(apply(layer, self.params[t], x))
            x = self.model.after[t](hs[-1])
        grads = torch.autograd.grad(loss(x), inputs + hs)
        pairs = list(zip(grads[: len(inputs)], grads[len(inputs) :], strict=True))
        return [a.detach() for a in inputs], pairs, x.detach()

    def _rows(self, t: int, x: Tensor, g_h: Tensor) -> Tensor:
        """Each sample's gradient of the loss at u, one autograd call per sample."""
        rows = []
        for i in range(len(x)):
            u = self.params[t].clone().requires_grad_()
            h = apply(self.model.layers[t], u, x[i : i + 1])
            rows.append(torch.autograd.grad(h, u, g_h[i : i + 1])[0])
        return torch.stack(rows)
