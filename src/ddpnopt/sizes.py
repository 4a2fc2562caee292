# SPDX-License-Identifier: MIT
"""Norms of many tensors, and whether what has been written is finite."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from ddpnopt.decisions import all_finite, traced
from ddpnopt.dtensors import joined, local
from ddpnopt.typing import Tensor

#: Smaller groups of tensors are not worth a look of their own.
WORTH = 1 << 16


def norms(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """Norms of many tensors, stacked, in one fused call."""
    parts = [local(t) for t in tensors]
    found: list[Tensor] = list(torch._foreach_norm(parts, order))
    if len({n.device for n in found}) > 1:
        found = [n.to(found[0].device) for n in found]
    stacked = torch.stack(found)
    if any(map(operator.is_not, parts, tensors)):
        stacked = joined(stacked, tensors, order)
    return stacked if stacked.dtype == torch.float64 else stacked.float()


class Sizes:
    """Norms of weights and statistics, taken while the processor's cache still holds them."""

    def __init__(self) -> None:
        self._seen: dict[Tensor, tuple[int, Tensor]] = {}

    def look(self, tensors: Sequence[Tensor]) -> None:
        """Of what has just been written."""
        if traced() or sum(t.numel() for t in tensors) < WORTH:
            return
        for t in tensors:
            if t.device.type == "cpu" and local(t) is t and not t.is_inference():
                self._seen[t] = t._version, torch.linalg.vector_norm(t)

    def finite(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all norms are finite; of tensors unchanged since a look, as seen then."""
        old: list[Tensor] = []
        new: list[Tensor] = []
        for t in tensors:
            version, size = self._seen.get(t, (0, None))
            if size is None or version != t._version:
                new.append(t)
            else:
                old.append(size)
        found = [float(size) for size in old]
        return all(map(math.isfinite, found)) and (not new or all_finite(norms(new)))
