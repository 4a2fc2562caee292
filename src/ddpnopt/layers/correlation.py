# SPDX-License-Identifier: MIT
"""Weight gradients of a convolution sample by sample, one place of the kernel at a time.

At one place of the kernel (a tap) every sample's gradient is one matrix product of its columns with
its shifted input. With stride 1 a shift is an offset into the flattened input, a view: nothing is
unfolded or copied, which would cost several times the products.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.positions import diagonal, scalar
from ddpnopt.typing import Tensor

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True, eq=False)
class Kept:
    """The samples' own gradients of one pass, kept to be summed again with other weights.

    Attributes:
        weight: (taps, B, groups, outputs, inputs) without the kernel's axes.
        bias: (B, outputs); None if there is none, or it is fixed.
        shape: The weight's shape.
    """

    weight: Tensor
    bias: Tensor | None
    shape: torch.Size

    def onto(self, gradients: Mapping[str, Tensor], a: Tensor, scale: float) -> dict[str, Tensor]:
        """gradients + scale sum_i a_i G_i."""
        found = {}
        if "weight" in gradients:
            total = (a @ self.weight.flatten(2)).reshape(-1, *self.weight.shape[2:])
            total = total.permute(1, 2, 3, 0).reshape(self.shape)
            found["weight"] = gradients["weight"].add(total, alpha=scale)
        if "bias" in gradients and self.bias is not None:
            found["bias"] = gradients["bias"].add(a @ self.bias, alpha=scale)
        return found


def shifted(conv: _Conv, x: Tensor, places: tuple[int, ...]) -> Iterator[Tensor]:
    """The input that each tap sees: (n, channels, positions), in the order of the kernel.

    Args:
        conv: The layer.
        x: Its input.
        places: Sizes of its output.

    Yields:
        With stride 1, positions are those of `widened`; else the output's own.
    """
    around = list(conv._reversed_padding_repeated_twice)
    axes = len(conv.kernel_size)
    unit = all(s == 1 for s in conv.stride)
    if unit and axes > 1 and conv.padding_mode == "zeros":
        around[-1] += 1  # the last taps read past the end, where the columns are zero
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    seen = F.pad(x, around, mode=mode) if any(around) else x
    taps = itertools.product(*(range(k) for k in conv.kernel_size))
    if not unit:
        for tap in taps:
            part = seen
            for axis, (at, d, s, size) in enumerate(
                zip(tap, conv.dilation, conv.stride, places, strict=True), start=2
            ):
                part = part.narrow(axis, at * d, (size - 1) * s + 1)
                part = part[(slice(None),) * axis + (slice(None, None, s),)]
            yield part.flatten(2)
        return
    sizes = seen.shape[2:]
    steps = [sizes[axis + 1 :].numel() for axis in range(axes)]
    length = places[0] * steps[0]
    flat = seen.flatten(2)
    reach = zip(conv.kernel_size, conv.dilation, steps, strict=True)
    last = sum((k - 1) * d * f for k, d, f in reach)
    if last + length > flat.shape[2]:
        flat = F.pad(flat, (0, last + length - flat.shape[2]))
    for tap in taps:
        at = sum(t * d * f for t, d, f in zip(tap, conv.dilation, steps, strict=True))
        yield flat[:, :, at : at + length]


def widened(conv: _Conv, V: Tensor) -> Tensor:
    """Columns (r, n, outputs, *places) at the positions of `shifted`, in one copy.

    Rows are as long as the padded input's.

    Returns:
        (n groups, r outputs / groups, positions).
    """
    columns, rows, _, *places = V.shape
    parts = V.reshape(columns, rows, conv.groups, -1, *places)
    parts = parts.permute(1, 2, 0, 3, *range(4, parts.dim()))
    if len(places) > 1 and all(s == 1 for s in conv.stride):
        reach = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        longer = [size + more for size, more in zip(places[1:], reach[1:], strict=True)]
        inner = wide = parts.new_empty(*parts.shape[:5], *longer)
        for axis, size in enumerate(places[1:], start=5):
            wide.narrow(axis, size, wide.shape[axis] - size).zero_()
            inner = inner.narrow(axis, 0, size)
        inner.copy_(parts)
        parts = wide
    return parts.reshape(rows * conv.groups, columns * parts.shape[3], -1)


def tap_gradients(conv: _Conv, x: Tensor, V: Tensor) -> Iterator[Tensor]:
    """Each tap's weight gradients of every sample and column.

    Args:
        conv: The layer.
        x: (n, channels, ...).
        V: Columns (r, n, outputs, ...).

    Yields:
        (n, groups, r, outputs / groups, channels / groups).
    """
    columns, rows = V.shape[:2]
    wide = widened(conv, V)
    for seen in shifted(conv, x, V.shape[3:]):
        if conv.groups > 1:
            seen = seen.reshape(rows * conv.groups, -1, seen.shape[2])
        found = torch.bmm(wide, seen.transpose(1, 2))
        yield found.reshape(rows, conv.groups, columns, V.shape[2] // conv.groups, -1)


def tap_matrices(
    conv: _Conv, x: Tensor, V: Tensor, bias: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Every sample's and column's whole weight gradients.

    Args:
        conv: The layer.
        x: (n, channels, ...).
        V: Columns (r, n, outputs, ...).
        bias: The bias's gradients, too.

    Returns:
        By tap (taps, n, groups, r, outputs, inputs); the bias's (r, n, outputs) or None; and both
        together as matrices of the layer (r, n, groups, outputs, inputs taps [+ 1]).
    """
    taps = torch.stack(list(tap_gradients(conv, x, V)))
    D = taps.permute(3, 1, 2, 4, 5, 0).flatten(4)
    if not bias:
        return taps, None, D
    sums = V.flatten(3).sum(3)
    return taps, sums, torch.cat([D, sums.reshape(*D.shape[:4], 1)], -1)


def tap_gram(
    conv: _Conv, x: Tensor, V: Tensor, P: float | Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Gram matrices of the columns pulled back to the weight, (n, r, r).

    Args:
        conv: The layer.
        x: (n, channels, ...).
        V: Columns (r, n, outputs, ...).
        P: The gain, a number or of the weight's shape.
        keep: Return the gradients themselves, too; one column only.

    Returns:
        The Gram matrices, and (taps, n, groups, outputs, inputs) or None.
    """
    groups, kept = conv.groups, []
    shaped = P.reshape(groups, -1, *P.shape[1:]).flatten(3) if diagonal(P) else None
    total: Tensor | None = None
    for tap, G in enumerate(tap_gradients(conv, x, V)):
        if G.shape[2] == 1 and shaped is None:
            part = G.flatten(1).square().sum(1)[:, None, None]
        else:
            weighted = G if shaped is None else G * shaped[..., tap][:, None]
            left, right = (one.transpose(1, 2).flatten(2) for one in (weighted, G))
            part = left @ right.mT
        total = part if total is None else total.add_(part)
        if keep:
            kept.append(G[:, :, 0])
    assert total is not None
    if shaped is None and scalar(P):
        total = total.mul_(P)
    return total, torch.stack(kept) if keep else None
