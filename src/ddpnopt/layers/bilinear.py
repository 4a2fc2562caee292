# SPDX-License-Identifier: MIT
"""Bilinear layers h_o = x1^T W_o x2 + b_o: one matrix on the outer product of two inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.matrix import MatrixRule
from ddpnopt.layers.registry import register
from ddpnopt.typing import Tensor


@register(nn.Bilinear)
class BilinearRule(MatrixRule):
    """The state holds both inputs, one behind the other."""

    arguments = (2,)

    def pack(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Both on one axis."""
        return torch.cat(list(inputs), -1)

    def unpack(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """And apart."""
        first = cast(nn.Bilinear, module).in1_features
        return x[..., :first], x[..., first:]

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """x1^T W x2."""
        first, second = self.unpack(module, x)
        return F.bilinear(first, second, cast(nn.Bilinear, module).weight.to(x.dtype))

    def output(self, module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """x1^T W x2 + b."""
        own = {name: p.to(x.dtype) for name, p in module.named_parameters()}
        own.update(parameters)
        first, second = self.unpack(module, x)
        return F.bilinear(first, second, own["weight"], own.get("bias"))

    # Not linear in the state, which holds both inputs: by automatic differentiation.
    mixed = LayerRule.mixed
    state_curvature = LayerRule.state_curvature

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """Sum of v (x1 (x) x2)."""
        U = self.inputs(module, x, 1)[0, 0]
        V = V.reshape(-1, V.shape[-1])
        gradient = {"weight": self.from_matrix(module, (V.T @ U)[None])}
        if module.bias is not None:
            gradient["bias"] = V.sum(0)
        return gradient

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """The outer product."""
        first, second = self.unpack(module, x)
        outer = first[..., :, None] * second[..., None, :]
        return outer.reshape(samples, 1, -1, outer.shape[-2] * outer.shape[-1])

    def outputs(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """V itself."""
        return V.reshape(V.shape[0], samples, 1, -1, V.shape[-1])

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(o, i1, i2) to one group."""
        return weight.flatten(1)[None]

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""
        return W[0].reshape(cast(nn.Bilinear, module).weight.shape)
