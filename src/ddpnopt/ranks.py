# SPDX-License-Identifier: MIT
"""Several processes that train one model together, and what they tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpnopt.typing import Tensor


def several() -> bool:
    """Whether more than one process trains."""
    d = torch.distributed
    return d.is_available() and d.is_initialized() and d.get_world_size() > 1


def replica(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel that a model is, has inside, or is being run by."""
    inside = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    # A model that is wrapped later (by a framework) shows its wrapper only while it is called.
    active: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return next(inside, None) or active


@dataclass(eq=False)
class Ranks:
    """The ranks that one model's gradients are averaged over.

    Attributes:
        replica: This rank's DistributedDataParallel.
        pooled: How many vectors have been summed in this backward pass.
    """

    replica: DistributedDataParallel
    pooled: int = 0

    @property
    def size(self) -> int:
        """W."""
        return torch.distributed.get_world_size(self.replica.process_group)

    def sum(self, vector: Tensor) -> Tensor:
        """Over the ranks, in place."""
        torch.distributed.all_reduce(vector, group=self.replica.process_group)
        return vector

    def pool(self, vector: Tensor) -> Tensor:
        """The same, counted: a rank that fails half-way knows whether the others wait for it."""
        self.pooled += 1
        return self.sum(vector)

    def least(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """The smallest of each number over the ranks."""
        vector = torch.tensor(numbers, dtype=torch.int64, device=device)
        smallest = torch.distributed.ReduceOp.MIN
        torch.distributed.all_reduce(vector, smallest, group=self.replica.process_group)
        return [int(number) for number in vector]

    def mean(
        self, given: Mapping[Tensor, Tensor], parameters: Sequence[Tensor], failed: bool
    ) -> tuple[dict[Tensor, Tensor], bool]:
        """The mean over the ranks, one all_reduce for each dtype and device.

        Args:
            given: This rank's tensors by parameter; zero for parameters that have none.
            parameters: The same on every rank.
            failed: This rank has nothing to give.

        Returns:
            The means, and whether any rank had nothing to give.
        """
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        found: dict[Tensor, Tensor] = {}
        for some in kinds.values():
            parts = [given[p] if p in given else torch.zeros_like(p) for p in some]
            flag = parts[0].new_full((1,), float(failed))
            flat = self.sum(torch.cat([*(part.reshape(-1) for part in parts), flag]))
            failed = failed or bool(flat[-1] > 0)
            pieces = torch.split(flat[:-1] / self.size, [p.numel() for p in some])
            found.update({p: piece.view_as(p) for p, piece in zip(some, pieces, strict=True)})
        return found, failed

    def gathered(self, one: Any) -> list[Any]:
        """Every rank's object."""
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, one, group=self.replica.process_group)
        return found
