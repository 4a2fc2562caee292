# SPDX-License-Identifier: MIT
"""Transposed convolutions in one to three dimensions, with every option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import nn

from ddpnopt.layers.conv import ConvolutionRule, by_position, windows
from ddpnopt.layers.registry import register
from ddpnopt.typing import Tensor

TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(ConvolutionRule):
    """At each input position the weight maps the channels to a patch of the output.

    So the matrix is (patch, input channels), and the bias, which every output has once, is no
    constant input of it.
    """

    joins_bias = False

    def call_refusal(self, module: nn.Module, given: Sequence[object]) -> str:
        """An output size given in the call is known to that call alone."""
        sized = any(one is not None and not isinstance(one, Tensor) for one in given)
        return f"{type(module).__name__} was called with an output_size" if sized else ""

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer without its bias."""
        conv = cast(_Transposed, module)
        return TRANSPOSED[len(conv.kernel_size)](
            x,
            conv.weight,
            None,
            conv.stride,
            conv.padding,
            conv.output_padding,
            conv.groups,
            conv.dilation,
        )

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """The channels at each position."""
        return by_position(x[None], samples, cast(_Transposed, module).groups)[0]

    def outputs(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """The patch of v that each input position makes."""
        conv = cast(_Transposed, module)
        axes = len(conv.kernel_size)
        columns, rows = V.shape[:2]
        around = [p for p in reversed(cast(tuple[int, ...], conv.padding)) for _ in range(2)]
        seen = F.pad(V.flatten(0, 1), around)
        views = windows(seen, conv.kernel_size, conv.stride, conv.dilation)
        for axis, size in enumerate(self._places(conv, V), start=2):
            views = views.narrow(axis, 0, size)
        groups = conv.groups
        views = views.reshape(columns, samples, rows // samples, groups, -1, *views.shape[2:])
        # (r, b, m, g, o, *places, *kernel) to (r, b, g, m places, o kernel)
        places, kernel = range(5, 5 + axes), range(5 + axes, 5 + 2 * axes)
        views = views.permute(0, 1, 3, 2, *places, 4, *kernel)
        patch = views.shape[4 + axes :].numel()
        return views.reshape(columns, samples, groups, -1, patch)

    def bias_columns(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """v at each output position."""
        return by_position(V, samples, cast(_Transposed, module).groups)

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(I, O / g, *kernel) to (g, o kernel, i)."""
        groups = cast(_Transposed, module).groups
        return weight.reshape(groups, weight.shape[0] // groups, -1).mT

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""
        return W.mT.reshape(cast(_Transposed, module).weight.shape)

    @staticmethod
    def _places(conv: _Transposed, V: Tensor) -> list[int]:
        """Sizes of the input, from the output's."""
        return [
            (out - 1 + 2 * p - d * (k - 1) - o) // s + 1
            for out, p, d, k, o, s in zip(
                V.shape[3:],
                cast(tuple[int, ...], conv.padding),
                conv.dilation,
                conv.kernel_size,
                conv.output_padding,
                conv.stride,
                strict=True,
            )
        ]
