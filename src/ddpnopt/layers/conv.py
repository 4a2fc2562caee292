# SPDX-License-Identifier: MIT
"""Convolutions in one to three dimensions, with every option."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import grad as gradients

from ddpnopt.layers import patches
from ddpnopt.layers.coordinates import Rotated
from ddpnopt.layers.correlation import Kept, tap_gram, tap_matrices
from ddpnopt.layers.matrix import MatrixRule
from ddpnopt.layers.registry import register
from ddpnopt.positions import (
    AT_ONCE,
    Gain,
    Kronecker,
    both,
    diagonal,
    matrices_gram,
    scalar,
    transforms_samples,
)
from ddpnopt.typing import Tensor

#: Random filters of a sketched Gram matrix; the relative standard error is sqrt(2 / this).
SKETCH_FILTERS = 8
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
INPUT_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    1: gradients.conv1d_input,
    2: gradients.conv2d_input,
    3: gradients.conv3d_input,
}
WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    1: gradients.conv1d_weight,
    2: gradients.conv2d_weight,
    3: gradients.conv3d_weight,
}
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def padded(conv: _Conv, x: Tensor) -> Tensor:
    """The input as the kernel sees it: padded by the layer's own mode."""
    both_ends_of_each_axis = conv._reversed_padding_repeated_twice
    if not any(both_ends_of_each_axis):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, both_ends_of_each_axis, mode=mode)


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a kernel sees at each of its places: (n, c, *places, *kernel), a view."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
    return x


class ConvolutionRule(MatrixRule):
    """What transposed ones share: h is (n, channels, ...)."""

    feature_axis = 1
    bias_apart = True

    def batched_dim(self, module: nn.Module) -> int:
        """(B, channels, ...)."""
        return len(cast(_Conv, module).kernel_size) + 2

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """The layer without its bias."""
        return self.function(module, dx)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(ConvolutionRule):
    """g_x^T v is the transposed convolution, g_u^T v the correlation of x with v (eq. 12-14)."""

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """The convolution; its bias does not matter to any linear map."""
        conv = cast(_Conv, module)
        return _convolve(conv, padded(conv, x), conv.weight)

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """The transposed convolution of all columns, without h."""
        conv = cast(_Conv, module)
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return super().pull(module, x, V)
        pulled = INPUT_GRADIENTS[len(conv.kernel_size)](
            (V.shape[0] * x.shape[0], *x.shape[1:]),
            conv.weight.to(V.dtype),
            V.flatten(0, 1),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        return pulled.reshape(V.shape[0], *x.shape)

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """One weight gradient; the bias takes the sum over samples and positions."""
        conv = cast(_Conv, module)
        weight = WEIGHT_GRADIENTS[len(conv.kernel_size)](
            padded(conv, x), list(conv.weight.shape), V, conv.stride, 0, conv.dilation, conv.groups
        )
        if conv.bias is None:
            return {"weight": weight}
        return {"weight": weight, "bias": self.bias_gradient(module, V)}

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """The inputs at each position."""
        conv = cast(_Conv, module)
        seen, size = padded(conv, x), conv.kernel_size
        if len(size) == 2:
            unfolded = F.unfold(
                seen, cast(Any, size), cast(Any, conv.dilation), 0, cast(Any, conv.stride)
            )
        else:
            views = windows(seen, size, conv.stride, conv.dilation)
            axes = len(size)
            views = views.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
            unfolded = views.flatten(2 + axes).flatten(1, 1 + axes)
        rows, inputs, positions = unfolded.shape
        group_inputs = inputs // conv.groups
        by_group = unfolded.reshape(samples, rows // samples, conv.groups, group_inputs, positions)
        return by_group.permute(0, 2, 1, 4, 3).reshape(samples, conv.groups, -1, group_inputs)

    def unfolded(self, module: nn.Module, x: Tensor) -> int:
        """As many times as the kernel has places."""
        return x.numel() * math.prod(cast(_Conv, module).kernel_size)

    def input_products(self, module: nn.Module, x: Tensor, samples: int, bias: bool) -> Tensor:
        """By offsets of the kernel's rows, where that is cheaper than by patches."""
        conv = cast(_Conv, module)
        seen = padded(conv, x)
        if not patches.pays(conv, seen):
            return super().input_products(module, x, samples, bias)
        return patches.products(conv, seen, bias)

    def rotated(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        samples: int,
        basis: tuple[Tensor, Tensor],
        bias: bool,
    ) -> Rotated | None:
        """Where `kept_gram` keeps them."""
        conv = cast(_Conv, module)
        if not self._rotates(conv, x, V, samples, bias) or self._large(conv, x, V, samples):
            return None
        taps, sums, D = tap_matrices(conv, x, V[None], bias)
        kept = Kept(taps[:, :, :, 0], None if sums is None else sums[0], conv.weight.shape)
        if conv.bias is not None and not bias and conv.bias.requires_grad:
            kept = replace(kept, bias=V.flatten(2).sum(2))
        return Rotated(kept, both(D[0], *basis), basis)

    def rotated_squares(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        samples: int,
        basis: tuple[Tensor, Tensor],
        bias: bool,
    ) -> Tensor:
        """By taps, where the samples' gradients are transformed and not what they are made of."""
        conv = cast(_Conv, module)
        if not self._rotates(conv, x, V, samples, bias):
            return super().rotated_squares(module, x, V, samples, basis, bias)
        step = max(1, AT_ONCE // conv.weight.numel())
        parts = [
            both(tap_matrices(conv, some, v[None], bias)[2][0], *basis).square().sum(0)
            for some, v in zip(torch.split(x, step), torch.split(V, step), strict=True)
        ]
        return reduce(torch.add, parts)

    def outputs(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """(r, n, O, ...) by group and position."""
        return by_position(V, samples, cast(_Conv, module).groups)

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(O, I, *kernel) to (g, o, i)."""
        groups = cast(_Conv, module).groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""
        return W.reshape(cast(_Conv, module).weight.shape)

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Exact, by taps or by pairs of positions; or sketched for a scalar gain."""
        P = gain.get("weight")
        biases = {name: one for name, one in gain.items() if name != "weight"}
        if sketch is not None and P is not None and scalar(P):
            columns = self.outputs(module, V, samples)
            estimate = _sketched(cast(_Conv, module), x, columns, samples, sketch) * P
            return estimate + super().gram(module, x, V, biases, samples)
        if P is None or not self._by_taps(module, x, V, P, samples):
            return super().gram(module, x, V, gain, samples)
        if isinstance(P, Kronecker):
            exact = _kronecker_gram(cast(_Conv, module), x, V, P)
        else:
            exact = tap_gram(cast(_Conv, module), x, V, P, keep=False)[0]
        return exact + super().gram(module, x, V, biases, samples) if biases else exact

    def kept_gram(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> tuple[Tensor, Kept] | None:
        """With the samples' gradients, unless they take more memory than the activations."""
        conv, P = cast(_Conv, module), gain.get("weight")
        if P is None or not self._by_taps(module, x, V, P, samples):
            return None
        if self._large(conv, x, V, samples):
            return None
        bias = None
        if isinstance(P, Kronecker):
            taps, sums, matrices = tap_matrices(conv, x, V, P.bias)
            total, weight = matrices_gram(matrices, gain=P), taps[:, :, :, 0]
            bias = None if sums is None else sums[0]
        else:
            total, kept = tap_gram(conv, x, V, P, keep=True)
            assert kept is not None
            weight = kept
        if "bias" in gain:
            bias = V[0].flatten(2).sum(2)
            P_b = gain["bias"]
            assert not isinstance(P_b, Kronecker)
            total = total + (bias.square() * P_b).sum(1)[:, None, None]
        return total, Kept(weight, bias, conv.weight.shape)

    @staticmethod
    def _large(conv: _Conv, x: Tensor, V: Tensor, samples: int) -> bool:
        """Whether the samples' gradients take more memory than the activations."""
        return samples * conv.weight.numel() > x.numel() + V.numel()

    @staticmethod
    def _rotates(conv: _Conv, x: Tensor, V: Tensor, samples: int, bias: bool) -> bool:
        """Whether one column's gradients are cheaper to transform than what they are made of."""
        outputs, inputs = len(conv.weight) // conv.groups, conv.weight[0].numel() + bias
        sizes = V.shape[2:].numel(), outputs, inputs
        return len(x) == samples and transforms_samples(1, *sizes, math.prod(sizes))

    @staticmethod
    def _by_taps(module: nn.Module, x: Tensor, V: Tensor, P: Gain, samples: int) -> bool:
        """Whether the samples' gradients cost less than products over positions, or their pairs."""
        conv = cast(_Conv, module)
        if x.shape[0] != samples:
            return False
        positions = V.shape[3:].numel()
        outputs, inputs = V.shape[2] // conv.groups, conv.weight[0].numel()
        columns = V.shape[0]
        if isinstance(P, Kronecker):
            return P.transforms_samples(columns, positions, outputs, inputs)
        few = positions * (inputs + columns * outputs) <= columns * inputs * outputs
        return diagonal(P) or not few


def _convolve(conv: _Conv, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of a padded input."""
    convolution = CONVOLUTIONS[len(conv.kernel_size)]
    return convolution(x, weight.to(x.dtype), None, conv.stride, 0, conv.dilation, conv.groups)


def _kronecker_gram(conv: _Conv, x: Tensor, V: Tensor, P: Kronecker) -> Tensor:
    """(n, r, r), some samples at a time: their gradients are as large as the weight each."""
    step = max(1, AT_ONCE // (V.shape[0] * conv.weight.numel()))
    parts = [
        matrices_gram(tap_matrices(conv, one, columns, P.bias)[2], gain=P)
        for one, columns in zip(torch.split(x, step), torch.split(V, step, 1), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_position(V: Tensor, samples: int, groups: int) -> Tensor:
    """(r, n, O, ...) to (r, b, g, t, o)."""
    columns, rows, features = V.shape[:3]
    V = V.reshape(columns, samples, rows // samples, groups, features // groups, -1)
    return V.permute(0, 1, 3, 2, 5, 4).reshape(columns, samples, groups, -1, features // groups)


def _sketched(
    conv: _Conv, x: Tensor, columns: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Unbiased |g_u|^2 = E_v |sum_t g_h[t] (x * v)[t]|^2 over random filters v, one for all o."""
    shape = (conv.groups * SKETCH_FILTERS, *conv.weight.shape[1:])
    filters = torch.randn(shape, generator=generator, dtype=torch.float32).to(x)
    response = _convolve(conv, padded(conv, x), filters)
    projected = by_position(response[None], samples, conv.groups)[0]
    images = torch.einsum("rbgto,bgtk->rbgok", columns, projected)
    return torch.einsum("rbgok,sbgok->brs", images, images) / SKETCH_FILTERS
