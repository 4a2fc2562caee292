# SPDX-License-Identifier: MIT
"""Sum of the products of a convolution's patches, A = sum u u^T, without whole patches.

A patch is K rows, and with stride 1 every row of the input is in K patches. What rows k and k' of
the patches have together is the same sum for all pairs with the same k' - k, but for where patches
end. So there are K sums over all rows instead of K^2, of patches of one row each, and what patches
outside of the output's grid would have added is taken off again. Exact.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ddpnopt.positions import AT_ONCE
from ddpnopt.typing import Float, Tensor

#: How many times as cheap it has to be in multiply-adds: it is made of more operators.
GAIN = 1.5
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def pays(conv: _Conv, seen: Float[Tensor, "n c h *w"]) -> bool:
    """Whether a padded input's patches are better not formed."""
    if conv.stride[0] > 1:
        return False
    K, R = conv.kernel_size[0], seen.shape[2]
    reach = conv.dilation[0] * (K - 1)
    return GAIN * (R * K + 2 * reach**2) <= (R - reach) * K**2


def products(conv: _Conv, seen: Float[Tensor, "n c h *w"], bias: bool) -> Float[Tensor, "g i i"]:
    """Sum over samples and positions of u u^T, by group, i = (channel, *tap).

    Args:
        conv: The layer.
        seen: Its padded input.
        bias: The constant 1 is the last entry of u.
    """
    taps = math.prod(conv.kernel_size[1:])
    step = max(1, AT_ONCE // (taps * math.prod(seen.shape[1:])))
    by_row, *others = (_by_row(conv, some) for some in torch.split(seen, step))
    for one in others:
        for mine, more in zip(by_row, one, strict=True):
            mine.add_(more)
    first = _by_pair(conv, *by_row)
    if not bias:
        return first
    total, count = _sums(conv, seen)
    corner = total.new_full((len(total), 1, 1), count)
    return torch.cat([torch.cat([first, total], 2), torch.cat([total.mT, corner], 2)], 1)


def _sums(conv: _Conv, seen: Float[Tensor, "n c h *w"]) -> tuple[Float[Tensor, "g i 1"], int]:
    """Sum over samples and positions of u, and how many there are."""
    count = len(seen)
    plane, options = seen.sum(0), zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    for axis, (k, d, s) in enumerate(options, start=1):
        size = plane.shape[axis] - d * (k - 1)
        count *= (size - 1) // s + 1
        parts = [plane.narrow(axis, d * tap, size) for tap in range(k)]
        # The taps' axis takes the place of the positions'.
        plane = torch.stack([p.unfold(axis, 1, s).sum((axis, -1)) for p in parts], axis)
    return plane.reshape(conv.groups, -1, 1), count


def _by_row(conv: _Conv, seen: Float[Tensor, "n c h *w"]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of what two rows of patches have together, f = (channel, *tap) without the rows' own.

    Returns:
        All rows that are k d apart (K, g, f, f); all pairs of the first d (K - 1) rows, and of the
        last, (g, f rows, f rows).
    """
    K, d, U = conv.kernel_size[0], conv.dilation[0], _rows(conv, seen)
    R, reach = U.shape[2], d * (K - 1)
    offsets = [
        torch.bmm(U[:, :, : R - k * d].flatten(2), U[:, :, k * d :].flatten(2).mT) for k in range(K)
    ]
    ends = (U[:, :, at].flatten(1, 2) for at in (slice(reach), slice(R - reach, R)))
    low, high = (torch.bmm(one, one.mT) for one in ends)
    return torch.stack(offsets), low, high


def _by_pair(
    conv: _Conv,
    offsets: Float[Tensor, "k g f f"],
    low: Float[Tensor, "g q q"],
    high: Float[Tensor, "g q q"],
) -> Float[Tensor, "g i i"]:
    """The same for every pair of the kernel's rows, i = (channel, *tap)."""
    K, d, (g, f) = conv.kernel_size[0], conv.dilation[0], offsets.shape[1:3]
    both = torch.cat([offsets[1:].flip(0).mT, offsets])
    taps = torch.arange(K, device=offsets.device)
    # (g, f, k, f, k') has the sum of k' - k.
    found = both[taps - taps[:, None] + K - 1].permute(2, 3, 0, 4, 1).contiguous()
    reach = d * (K - 1)
    low, high = (one.reshape(g, f, reach, f, reach) for one in (low, high))
    _take_off(found, low, high, d)
    c = conv.in_channels // g
    found = found.reshape(g, c, f // c, K, c, f // c, K).permute(0, 1, 3, 2, 4, 6, 5)
    return found.reshape(g, f * K, f * K)


def _rows(conv: _Conv, seen: Float[Tensor, "n c h *w"]) -> Float[Tensor, "g f h m"]:
    """Patches of one row, f = (channel, *tap) without the rows' own, at m = (sample, *place)."""
    axes = len(conv.kernel_size)
    for axis in range(1, axes):
        k, d, s = conv.kernel_size[axis], conv.dilation[axis], conv.stride[axis]
        seen = seen.unfold(axis + 2, (k - 1) * d + 1, s)[..., ::d]
    places, taps = range(3, 2 + axes), range(2 + axes, 1 + 2 * axes)
    U = seen.permute(1, *taps, 2, 0, *places).flatten(axes + 1)
    return U.reshape(conv.groups, -1, *U.shape[axes:])


def _take_off(
    total: Float[Tensor, "g f k f k"],
    low: Float[Tensor, "g f r f r"],
    high: Float[Tensor, "g f r f r"],
    d: int,
) -> None:
    """Less what patches before the grid and behind it have, in place.

    A patch that begins t rows before the grid has its tap k in row d k - t of the first ones; one
    that ends t rows behind it has its tap in row t - 1 + d k of the last.
    """
    reach = low.shape[2]
    for t in range(1, reach + 1):
        first, taps = -(-t // d), (reach - t) // d + 1
        at = slice(d * first - t, reach - t + 1, d)
        total[:, :, first:, :, first:].sub_(low[:, :, at, :, at])
        at = slice(t - 1, t + d * (taps - 1), d)
        total[:, :, :taps, :, :taps].sub_(high[:, :, at, :, at])
