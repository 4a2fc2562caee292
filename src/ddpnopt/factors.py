# SPDX-License-Identifier: MIT
"""What Kronecker-factored curvatures measure of a layer: inputs and gradients at each position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.positions import AT_ONCE
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks


@dataclass(frozen=True, eq=False)
class Factors:
    """Inputs U (b, g, t, i) and gradients V (b, g, t, o), some samples at a time.

    The inputs of a convolution are as many times its states as its kernel has places: unfolded for
    a whole batch they leave every cache. They are made anew whenever they are gone through, where
    they are not few enough to be one part.

    Args:
        layer: The layer.
        vectors: V_h of each pass.
        scale: On V.
    """

    layer: Layer
    vectors: Blocks
    scale: float
    _whole: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """U and V of one part after the other."""
        if self._whole:
            yield self._whole[0]
            return
        layer, rule = self.layer, self.layer.rule
        assert isinstance(rule, MatrixRule)
        for (stage, samples), v in zip(layer.pairs(), self.vectors, strict=True):
            x, v = layer.x(stage), v.to(layer.dtype)
            for n, x_n, v_n in self._parts(x, v, samples):
                V = rule.outputs(layer.module, v_n[None], n)[0]
                part = rule.inputs(layer.module, x_n, n), V * self.scale
                if n == samples and len(layer.blocks) == 1:
                    self._whole.append(part)
                yield part

    def _parts(self, x: Tensor, v: Tensor, samples: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Some samples after the others: how many, and their rows."""
        rule, module = self.layer.rule, self.layer.module
        assert isinstance(rule, MatrixRule)
        inputs = rule.width(module) * v.numel() // max(1, v.shape[rule.feature_axis])
        step = samples * AT_ONCE // max(1, inputs)
        if step >= samples or len(x) % samples or len(v) % samples:
            yield samples, x, v
            return
        step = max(1, step)
        own, rows = len(x) // samples, len(v) // samples
        for at in range(0, samples, step):
            n = min(step, samples - at)
            yield n, x.narrow(0, at * own, n * own), v.narrow(0, at * rows, n * rows)
