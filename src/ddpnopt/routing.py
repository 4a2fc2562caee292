# SPDX-License-Identifier: MIT
"""Where a pass picks rows by indices: which sample owns them may change from pass to pass.

What earlier passes have shown of a structure holds only while its indices are those of a pass that
has been looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import Node

from ddpnopt.typing import Tensor

#: Nodes of the graph that move, pick or repeat entries by a tensor of indices, or a mask.
ROUTING = frozenset(
    f"{name}Backward{n}"
    for name in (
        "Index IndexSelect IndexPut IndexAdd IndexCopy IndexReduce Gather Scatter ScatterAdd "
        "ScatterReduce MaskedSelect MaskedScatter Take Put Sort Topk Embedding RepeatInterleave"
    ).split()
    for n in (0, 1)
)
_SAVED = ("_saved_indices", "_saved_index", "_saved_mask", "_saved_repeats")
_LEAF = "torch::autograd::AccumulateGrad"


def fingerprint(routes: Iterable[tuple[int, Node]], start: int, samples: int) -> int | None:
    """What the indices of a pass are, as a number; None where no index can move a sample.

    Args:
        routes: The nodes, each with the stage that it lies in front of.
        start: The first stage that keeps samples apart: what lies before does not matter.
        samples: B.
    """
    found = []
    for stage, node in routes:
        children = [child for child, _ in node.next_functions if child is not None]
        if stage < start or all(child.name() == _LEAF for child in children):
            continue  # or a table is looked up in a parameter
        indices = [t for t in _indices(node) if t is not None]
        if indices and not _keeps_rows(node, samples):
            found.append((stage, node.name(), tuple(map(_hash, indices))))
    return hash(tuple(found)) if found else None


def _indices(node: Node) -> tuple[Tensor | None, ...]:
    for name in _SAVED:
        saved = getattr(node, name, None)
        if saved is not None:
            return (saved,) if isinstance(saved, Tensor) else tuple(saved)
    return ()


def _keeps_rows(node: Node, samples: int) -> bool:
    """Whether each row of dimension 0 stays its sample's: it is another dimension that is indexed.

    So it is in ``h[torch.arange(B), lengths - 1]`` and ``h.gather(1, index)``.
    """
    indices = _indices(node)
    dim = getattr(node, "_saved_dim", None)
    first = indices[0]
    if dim is None:
        if first is None or first.dtype == torch.bool or len(indices) < 2:
            return False
        rows = torch.arange(samples, device=first.device)
        alone = first.dim() == 1 or (first.dim() > 1 and first[0].numel() == 1)
        return alone and first.numel() == samples and bool((first.flatten() == rows).all())
    if first is None or first.dim() < 2:
        return False
    dim = dim - 2**64 if dim >= 2**63 else dim
    return dim % first.dim() > 0 and first.shape[0] % samples == 0


def _hash(t: Tensor) -> tuple[tuple[int, ...], int]:
    """Shape, and a sum that changes with any entry and with their order."""
    flat = t.detach().flatten().to(torch.int64)
    place = torch.arange(1, len(flat) + 1, device=t.device) * -7046029254386353131
    mixed = (flat + 1) * place
    return tuple(t.shape), int((mixed ^ (mixed >> 29)).sum())
