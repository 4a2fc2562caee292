# SPDX-License-Identifier: MIT
"""Tensors that are spread over the ranks (DTensors): this rank's part, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ddpnopt.typing import Tensor


def spread_out(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; the tensor itself where there are no others."""
    return cast(Any, tensor).to_local() if spread_out(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank, which all have to ask for it."""
    return cast(Any, tensor).full_tensor() if spread_out(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What every rank has all of, spread out as another one is."""
    from torch.distributed.tensor import DTensor, Replicate

    spec = cast(Any, like)
    everywhere = [Replicate()] * spec.device_mesh.ndim
    given = DTensor.from_local(tensor, spec.device_mesh, everywhere, run_check=False)
    return given.redistribute(placements=spec.placements)


def summed(numbers: Tensor, of: Tensor) -> Tensor:
    """Sums over the parts of a tensor, from those of each part.

    Args:
        numbers: Of this rank's part.
        of: The tensor whose parts they are of.
    """
    if not spread_out(of):
        return numbers
    from torch.distributed.tensor import DTensor, Partial, Replicate

    spec = cast(Any, of)
    # A mesh of several dimensions holds copies along those that nothing is spread over.
    kinds = [Partial() if one.is_shard() else Replicate() for one in spec.placements]
    return DTensor.from_local(numbers, spec.device_mesh, kinds, run_check=False).full_tensor()


def joined(norms: Tensor, tensors: Sequence[Tensor], order: float) -> Tensor:
    """Norms of tensors of which some are spread over the ranks, all over the same ones.

    Args:
        norms: Of this rank's parts, stacked.
        tensors: Whose norms they are.
        order: Of the norms.
    """
    spread = [k for k, one in enumerate(tensors) if spread_out(one)]
    if spread:
        powers = summed(norms[spread].double() ** order, tensors[spread[0]])
        norms[spread] = (powers ** (1 / order)).to(norms)
    return norms
