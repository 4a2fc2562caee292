# SPDX-License-Identifier: MIT
"""Outputs as rows of class scores, looked at in chunks of bounded size.

Logits over positions and a large vocabulary are often the largest tensor of a step. What is done
with them here needs several temporaries of their size; chunks keep these in the processor's cache
and out of the memory's peak.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddpnopt.typing import Tensor

#: Types too coarse to compute a loss in.
HALF = (torch.float16, torch.bfloat16)
#: Elements of a chunk: as few as keep the overhead of a call small, by type of device.
CHUNK = {"cpu": 2**18}
#: On other devices a call costs more.
LARGE_CHUNK = 2**24


def working(z: Tensor) -> torch.dtype:
    """The type in which a loss of the output z is computed."""
    return torch.float32 if z.dtype in HALF else z.dtype


def chunk_size(z: Tensor) -> int:
    """Elements that a chunk of z holds."""
    return CHUNK.get(z.device.type, LARGE_CHUNK)


def chunks(axis: int, *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The rows (n, C) of some tensors of one shape, chunk by chunk.

    Args:
        axis: Class axis; the rows are numbered along the other axes in their order.
        tensors: The tensors. Where the rows don't lie in memory one after another, they are
            copied, as many as the chunk has, but never less than those of one sample.

    Yields:
        Which rows, and them.
    """
    moved = [t.movedim(axis, -1) for t in tensors]
    classes = moved[0].shape[-1]
    step = max(1, chunk_size(tensors[0]) // classes)
    each = moved[0][0].numel() // classes if len(moved[0]) else 1
    whole = all(m.is_contiguous() for m in moved)
    samples = len(moved[0]) if whole else max(1, step // max(1, each))
    for first in range(0, len(moved[0]), samples or 1):
        flat = [m[first : first + samples].reshape(-1, classes) for m in moved]
        for start in range(0, len(flat[0]), step):
            part = tuple(f[start : start + step] for f in flat)
            at = first * each + start
            yield slice(at, at + len(part[0])), part
