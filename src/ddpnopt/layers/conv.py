# SPDX-License-Identifier: MIT
"""Two-dimensional convolutions with every option: stride, padding, dilation, groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from ddpnopt.layers.base import register
from ddpnopt.layers.matrix import MatrixRule
from ddpnopt.positions import Gain, Kronecker
from ddpnopt.typing import Tensor

#: Random filters of a sketched Gram matrix; the relative standard error is sqrt(2 / this).
SKETCH_FILTERS = 8


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The input as the kernel sees it: padded by the layer's own mode."""
    left_right_top_bottom = conv._reversed_padding_repeated_twice
    if not any(left_right_top_bottom):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, left_right_top_bottom, mode=mode)


@register(nn.Conv2d)
class Conv2dRule(MatrixRule):
    """g_x^T v is the transposed convolution, g_u^T v the correlation of x with v (eq. 12-14)."""

    feature_axis = 1

    def batched_dim(self, module: nn.Module) -> int:
        """(B, channels, height, width)."""
        return 4

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """The convolution without its bias."""
        conv = cast(nn.Conv2d, module)
        dx = padded(conv, dx)
        return F.conv2d(dx, conv.weight, None, conv.stride, 0, conv.dilation, conv.groups)

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """The convolution; the bias does not matter to any linear map."""
        return self.push(module, x, x)

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """One weight gradient; the bias takes the sum over samples and positions."""
        conv = cast(nn.Conv2d, module)
        shape = list(conv.weight.shape)
        gradient = {
            "weight": conv2d_weight(  # type: ignore[no-untyped-call]
                padded(conv, x), shape, V, conv.stride, 0, conv.dilation, conv.groups
            )
        }
        if conv.bias is not None:
            gradient["bias"] = V.sum((0, 2, 3))
        return gradient

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """The inputs at each position."""
        conv = cast(nn.Conv2d, module)
        kernel = cast(tuple[int, int], conv.kernel_size)
        patches = F.unfold(padded(conv, x), kernel, conv.dilation, 0, conv.stride)
        rows, inputs, positions = patches.shape
        group_inputs = inputs // conv.groups
        patches = patches.reshape(samples, rows // samples, conv.groups, group_inputs, positions)
        patches = patches.permute(0, 2, 1, 4, 3)
        return patches.reshape(samples, conv.groups, -1, group_inputs)

    def outputs(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """(r, n, O, H, W) by group and position."""
        return _by_position(V, samples, cast(nn.Conv2d, module).groups)

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(O, I, kh, kw) to (g, o, i)."""
        groups = cast(nn.Conv2d, module).groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""
        return W.reshape(cast(nn.Conv2d, module).weight.shape)

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Exact by unfolding (see positions.py), or sketched for a scalar gain."""
        P = gain.get("weight")
        if sketch is None or P is None or isinstance(P, Tensor | Kronecker):
            return super().gram(module, x, V, gain, samples)
        conv = cast(nn.Conv2d, module)
        columns = self.outputs(module, V, samples)
        estimate = _sketched(conv, x, columns, samples, sketch) * P
        biases = {name: one for name, one in gain.items() if name != "weight"}
        return estimate + super().gram(module, x, V, biases, samples)


def _by_position(V: Tensor, samples: int, groups: int) -> Tensor:
    """(r, n, O, H, W) to (r, b, g, t, o)."""
    columns, rows, features = V.shape[:3]
    V = V.reshape(columns, samples, rows // samples, groups, features // groups, -1)
    return V.permute(0, 1, 3, 2, 5, 4).reshape(columns, samples, groups, -1, features // groups)


def _sketched(
    conv: nn.Conv2d, x: Tensor, columns: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Unbiased |g_u|^2 = E_v |sum_t g_h[t] (x * v)[t]|^2 over random filters v, one for all o."""
    shape = (conv.groups * SKETCH_FILTERS, *conv.weight.shape[1:])
    filters = torch.randn(shape, generator=generator, dtype=torch.float32).to(x)
    response = F.conv2d(padded(conv, x), filters, None, conv.stride, 0, conv.dilation, conv.groups)
    projected = _by_position(response[None], samples, conv.groups)[0]
    images = torch.einsum("rbgto,bgtk->rbgok", columns, projected)
    return torch.einsum("rbgok,sbgok->brs", images, images) / SKETCH_FILTERS
