# SPDX-License-Identifier: MIT
"""Two-dimensional convolutions with every option: stride, padding, dilation, groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from ddpnopt.layers.base import LayerRule, register
from ddpnopt.layers.positions import Gain, bias_gram, total, weight_gram, weight_squares
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
class Conv2dRule(LayerRule):
    """g_x^T v is the transposed convolution, g_u^T v the correlation of x with v (eq. 12-14)."""

    feature_axis = 1
    batched_dim = 4

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        conv = cast(nn.Conv2d, module)
        x = padded(conv, x)
        return F.conv2d(x, conv.weight, None, conv.stride, 0, conv.dilation, conv.groups)

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
        conv = cast(nn.Conv2d, module)
        parts = []
        columns = _by_position(V, samples, conv.groups)
        if "weight" in gain:
            P = gain["weight"]
            if sketch is not None and not isinstance(P, Tensor):
                parts.append(_sketched(conv, x, columns, samples, sketch) * P)
            else:
                if isinstance(P, Tensor):
                    P = P.reshape(conv.groups, P.shape[0] // conv.groups, -1)
                parts.append(weight_gram(_unfolded(conv, x, samples), columns, P))
        if "bias" in gain:
            P = gain["bias"]
            P = P.reshape(conv.groups, -1) if isinstance(P, Tensor) else P
            parts.append(bias_gram(columns, P))
        return total(parts, V, samples)

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """Squares of the per-sample gradients, formed by unfolding."""
        conv = cast(nn.Conv2d, module)
        columns = _by_position(V[None], samples, conv.groups)[0]
        weight = weight_squares(_unfolded(conv, x, samples), columns)
        squares = {"weight": weight.reshape(conv.weight.shape)}
        if conv.bias is not None:
            squares["bias"] = columns.sum(2).square().sum(0).reshape(-1)
        return squares


def _unfolded(conv: nn.Conv2d, x: Tensor, samples: int) -> Tensor:
    """The inputs at each position, (b, g, t, i); rows folded into the batch become positions."""
    kernel = cast(tuple[int, int], conv.kernel_size)
    patches = F.unfold(padded(conv, x), kernel, conv.dilation, 0, conv.stride)
    rows, inputs, positions = patches.shape
    group_inputs = inputs // conv.groups
    patches = patches.reshape(samples, rows // samples, conv.groups, group_inputs, positions)
    return patches.permute(0, 2, 1, 4, 3).reshape(samples, conv.groups, -1, group_inputs)


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
