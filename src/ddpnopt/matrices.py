# SPDX-License-Identifier: MIT
"""A layer's linear maps as explicit matrices, per sample: second-order dynamics, vanilla DDP.

Everything here is what the rest of the library avoids to form; sizes are those of small layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ddpnopt.layers import MatrixRule
from ddpnopt.layers.base import unit_columns
from ddpnopt.linearise import second_derivative
from ddpnopt.positions import scalar
from ddpnopt.stages import Stage
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks

if TYPE_CHECKING:
    from ddpnopt.layer import Layer


@dataclass(frozen=True, eq=False)
class Matrices:
    """Satisfies `value.base.Matrices`.

    Attributes:
        layer: Whose maps they are.
    """

    layer: Layer

    def control(self) -> Tensor:
        """(B, U, H), by unit columns."""
        parts = [
            self._pulled(s, n, unit_columns(self.layer.G(s), n)) for s, n in self.layer.pairs()
        ]
        return torch.cat(parts, 1).permute(1, 2, 0)

    def control_columns(self) -> Tensor:
        """(1 + r, B, U)."""
        parts = [self._pulled(s, n, self.layer.columns(s)) for s, n in self.layer.pairs()]
        return torch.cat(parts, 1)

    def joint_gram(self) -> Tensor:
        """((1 + r) B, (1 + r) B), the columns' Gram matrix over all pairs of samples.

        With one position and a scalar gain it is (V V^T) . (x x^T + 1), and no sample's gradient is
        formed; else by those.
        """
        layer = self.layer
        numbers = {name: P for name, P in layer.gain.items() if scalar(P)}
        if isinstance(layer.rule, MatrixRule) and len(numbers) == len(layer.params):
            rule, module = layer.rule, layer.module
            U = torch.cat([rule.inputs(module, layer.x(s), n) for s, n in layer.pairs()])
            V = torch.cat([rule.outputs(module, layer.columns(s), n) for s, n in layer.pairs()], 1)
            if U.shape[1] == U.shape[2] == 1:
                weight, bias = numbers.get("weight", 0.0), numbers.get("bias", 0.0)
                x, v = U[:, 0, 0], V[:, :, 0, 0].flatten(0, 1)
                pairs = (x @ x.T) * weight + bias
                return (v @ v.T) * pairs.repeat(len(V), len(V))
        rows = self.control_columns().flatten(0, 1)
        return rows @ self.precondition(rows.T[None])[0]

    def _pulled(self, stage: Stage, samples: int, columns: Tensor) -> Tensor:
        found = self.layer.rule.sample_gradients(
            self.layer.module, self.layer.x(stage), columns, samples
        )
        return torch.cat([found[name].flatten(2) for name in self.layer.params], -1)

    def precondition(self, columns: Tensor) -> Tensor:
        """P times (B, U, k), by the gains of the parameters."""
        B, _, k = columns.shape
        rows = columns.transpose(1, 2).reshape(B * k, -1)
        sizes = [p.numel() for p in self.layer.params.values()]
        named = {
            name: part.reshape(-1, *p.shape)
            for (name, p), part in zip(
                self.layer.params.items(), torch.split(rows, sizes, -1), strict=True
            )
        }
        found = torch.func.vmap(self.layer.applied)(named)
        flat = torch.cat([found[name].flatten(1) for name in self.layer.params], -1)
        return flat.reshape(B, k, -1).transpose(1, 2)

    def state_map(self) -> Tensor:
        """(B, H, X), by pulling back unit columns."""
        g = self.layer.gradient()
        unit = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        return self.layer.pull(unit.expand(len(g), -1, -1)).mT

    def state(self, dx: Blocks) -> Tensor:
        """(B, X)."""
        parts = [d.reshape(n, -1) for d, n in zip(dx, self.layer.counts, strict=True)]
        return torch.cat(parts).to(self.layer.dtype)

    def mixed(self, V: Tensor) -> Tensor:
        """(B, U, X), by the rule at unit changes of the state."""
        parts = []
        for (stage, n), v in zip(self.layer.pairs(), self.layer.split(V), strict=True):
            x = self.layer.x(stage)
            rows = [t.reshape(n, -1, *t.shape[1:]) for t in (x, v.to(self.layer.dtype))]
            unit = unit_columns(x, n).reshape(-1, n, *rows[0].shape[1:])
            one = torch.func.vmap(partial(self.layer.rule.mixed, self.layer.module))
            found = torch.func.vmap(one, (None, 0, None))(rows[0], unit, rows[1])
            parts.append(torch.cat([found[name].flatten(2) for name in self.layer.params], -1))
        return torch.cat(parts, 1).permute(1, 2, 0)

    def state_curvature(self, V: Tensor) -> Tensor | None:
        """(B, X, X)."""
        parts = [
            self.layer.rule.state_curvature(
                self.layer.module, self.layer.x(stage), v.to(self.layer.dtype), n
            )
            for (stage, n), v in zip(self.layer.pairs(), self.layer.split(V), strict=True)
        ]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known else None

    def segment_curvature(self, V: Tensor) -> Tensor:
        """(B, H, H), by differentiating twice from this layer's output to the next state."""
        parts = [
            second_derivative(one.h, one.end, v, len(v))
            for one, v in zip(self.layer.segments, torch.split(V, self.layer.counts), strict=True)
        ]
        return torch.cat(parts)
