# SPDX-License-Identifier: MIT
"""What Kronecker-factored curvatures measure of a layer, summed over its passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import torch

from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks


@dataclass(frozen=True, eq=False)
class Factors:
    """Inputs u and gradients v at each position. Satisfies `curvature.kronecker.Factors`.

    Args:
        layer: The layer.
        vectors: V_h of each pass.
        scale: On V.
    """

    layer: Layer
    vectors: Blocks
    scale: float

    def products(self, bias: bool) -> tuple[Tensor, Tensor, int]:
        """Sums of u u^T and of v v^T, by group, and how many v there were."""
        rule, module = self._rule, self.layer.module
        A, G = list[Tensor](), list[Tensor]()
        rows = 0
        for x, V, samples in self._passes():
            A.append(rule.input_products(module, x, samples, bias))
            outputs, positions = rule.output_products(module, V, samples)
            G.append(outputs)
            rows += positions
        return reduce(torch.add, A), reduce(torch.add, G), rows

    def squares(self, T_A: Tensor, T_G: Tensor, bias: bool) -> Tensor:
        """Sum over the samples of (T_G D T_A^T)^2, D their weight gradients."""
        rule, module = self._rule, self.layer.module
        parts = [
            rule.rotated_squares(module, x, V, samples, (T_A, T_G), bias)
            for x, V, samples in self._passes()
        ]
        return reduce(torch.add, parts)

    @property
    def _rule(self) -> MatrixRule:
        assert isinstance(self.layer.rule, MatrixRule)
        return self.layer.rule

    @cached_property
    def _scaled(self) -> list[Tensor]:
        return [v.to(self.layer.dtype) * self.scale for v in self.vectors]

    def _passes(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for (stage, samples), V in zip(self.layer.pairs(), self._scaled, strict=True):
            yield self.layer.x(stage), V, samples
