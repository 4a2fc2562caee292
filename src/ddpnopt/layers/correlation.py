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

#: Channels below this are few; columns from which on a product's time grows with them.
FEW, WIDE = 8, 32
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


def _padded(conv: _Conv, x: Tensor, after: int, last: bool) -> Tensor:
    """The input as the kernel sees it, (n groups, channels / groups, *places), in one copy.

    Args:
        conv: The layer.
        x: (n, channels, ...).
        after: Places of zeros to add at the end of the first axis.
        last: Channels come last.
    """
    rows, axes, places = x.shape[0], len(conv.kernel_size), x.shape[2:]
    around = list(conv._reversed_padding_repeated_twice)
    if any(around) and conv.padding_mode != "zeros":
        x, around = F.pad(x, around, mode=conv.padding_mode), [0] * (2 * axes)
        places = x.shape[2:]
    around[-1] += after
    parts = x.reshape(rows, conv.groups, -1, *places)
    first = 2 if last else 3
    parts = parts.movedim(2, -1) if last else parts
    shape = list(parts.shape)
    shape[first : first + axes] = [
        size + before + behind
        for size, before, behind in zip(places, around[-2::-2], around[::-2], strict=True)
    ]
    inner = wide = x.new_empty(shape)
    for axis, size in enumerate(places, start=first):
        before, end = around[2 * (first - axis) - 2], wide.shape[axis]
        inner.narrow(axis, 0, before).zero_()
        inner.narrow(axis, before + size, end - before - size).zero_()
        inner = inner.narrow(axis, before, size)
    inner.copy_(parts)
    return wide.flatten(0, 1)


def shifted(conv: _Conv, x: Tensor, places: tuple[int, ...], last: bool) -> Iterator[Tensor]:
    """The input that each tap sees, (n groups, channels / groups, positions), in kernel order.

    Args:
        conv: The layer.
        x: Its input.
        places: Sizes of its output.
        last: Channels come last.

    Yields:
        With stride 1, positions are those of `widened`; else the output's own.
    """
    axes, first = len(conv.kernel_size), 1 if last else 2
    unit = all(s == 1 for s in conv.stride)
    # The last taps read past the end, where the columns are zero.
    seen = _padded(conv, x, int(unit and axes > 1), last)
    sizes = seen.shape[first : first + axes]
    steps = [sizes[axis + 1 :].numel() for axis in range(axes)]
    length = places[0] * steps[0]
    flat = seen.flatten(first, first + axes - 1)
    for tap in itertools.product(*(range(k) for k in conv.kernel_size)):
        if unit:
            at = sum(t * d * f for t, d, f in zip(tap, conv.dilation, steps, strict=True))
            yield flat.narrow(first, at, length)
            continue
        part = seen
        for axis, (at, d, s, size) in enumerate(
            zip(tap, conv.dilation, conv.stride, places, strict=True), start=first
        ):
            part = part.narrow(axis, at * d, (size - 1) * s + 1)
            part = part[(slice(None),) * axis + (slice(None, None, s),)]
        yield part.flatten(first, first + axes - 1)


def factors(conv: _Conv, x: Tensor, places: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Factors (n groups, positions, taps channels / groups) of the products, with their taps.

    Channels come last, where products are faster by a fifth, if there are many. Taps of few stand
    side by side: a narrow product takes as long as a wider one.
    """
    channels = x.shape[1] // conv.groups
    last = channels >= FEW
    together = 1 if last or conv.groups > 1 else WIDE // channels
    taps = shifted(conv, x, places, last)
    while some := list(itertools.islice(taps, together)):
        seen = some[0] if len(some) == 1 else torch.cat(some, 1)
        yield len(some), seen if last else seen.transpose(1, 2)


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
    for taps, seen in factors(conv, x, V.shape[3:]):
        found = torch.bmm(wide, seen)
        parts = found.reshape(rows, conv.groups, columns, V.shape[2] // conv.groups, taps, -1)
        yield from parts.unbind(-2)


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
            part = torch.linalg.vector_norm(G.flatten(1), dim=1).square()[:, None, None]
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
