# SPDX-License-Identifier: MIT
"""What Kronecker-factored curvatures measure of a layer, summed over its passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.layers.coordinates import Coordinates, Rotated
from ddpnopt.stages import Stage
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks


@dataclass(frozen=True, eq=False)
class Factors:
    """Inputs u and gradients v at each position. Satisfies `curvature.kronecker.Factors`.

    Args:
        layer: The layer.
        vectors: V_h of each pass.
        scale: On V.
        lengths: The layer will be asked for the lengths of these vectors next.
    """

    layer: Layer
    vectors: Blocks
    scale: float
    lengths: bool

    def products(self, bias: bool) -> tuple[Tensor, Tensor, int]:
        """Sums of u u^T and of v v^T, by group, and how many v there were."""
        rule, module = self._rule, self.layer.module
        A, G = list[Tensor](), list[Tensor]()
        rows = 0
        for (stage, samples), v in zip(self.layer.pairs(), self.vectors, strict=True):
            A.append(rule.input_products(module, self.layer.x(stage), samples, bias))
            V = v.to(self.layer.dtype) * self.scale
            outputs, positions = rule.output_products(module, V, samples)
            G.append(outputs)
            rows += positions
        return reduce(torch.add, A), reduce(torch.add, G), rows

    def squares(self, T_A: Tensor, T_G: Tensor, bias: bool) -> Tensor:
        """Sum over the samples of (T_G D T_A^T)^2, D their weight gradients."""
        rule, module, basis = self._rule, self.layer.module, (T_A, T_G)
        parts = list[Tensor]()
        for (stage, samples), v in zip(self.layer.pairs(), self.vectors, strict=True):
            x, found = self.layer.x(stage), None
            if self.lengths and v is stage.G and stage.Z_h is None:
                found = self._kept(stage, x, v, samples, basis, bias)
            if found is not None:
                parts.append(found.squares() * self.scale**2)
            else:
                V = v.to(self.layer.dtype) * self.scale
                parts.append(rule.rotated_squares(module, x, V, samples, basis, bias))
        return reduce(torch.add, parts)

    def _kept(
        self,
        stage: Stage,
        x: Tensor,
        v: Tensor,
        samples: int,
        basis: tuple[Tensor, Tensor],
        bias: bool,
    ) -> Rotated | Coordinates | None:
        """What the layer will need again for the lengths of a pass's plain gradients."""
        layer, rule = self.layer, self._rule
        D = rule.rotated(layer.module, x, v, samples, basis, bias)
        if D is not None:
            layer.rotated[stage] = D
            return D
        V = rule.outputs(layer.module, v[None], samples)[0]
        if not Coordinates.pays(V, rule.width(layer.module)):
            return None
        U = rule.inputs(layer.module, x, samples)
        found = layer.coordinates[stage] = Coordinates.of(U, V, basis, bias)
        return found

    @property
    def _rule(self) -> MatrixRule:
        assert isinstance(self.layer.rule, MatrixRule)
        return self.layer.rule
