# SPDX-License-Identifier: MIT
"""Which ranks an optimizer trains with, and who averages their gradients."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.ranges import check_switch
from ddpnopt.ranks import Ranks, Together
from ddpnopt.typing import Tensor

COMMUNICATION = ("layerwise", "two_bucket")
#: Steps from one comparison of the ranks' weights, and look at the model, to the next.
COMPARE_EVERY = 100


def several(group: Any = None) -> bool:
    """Whether more than one process trains."""
    d = torch.distributed
    return d.is_available() and d.is_initialized() and d.get_world_size(group) > 1


def replica(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel that a model is, has inside, or is being run by."""
    inside = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    # A model that is wrapped later (by a framework) shows its wrapper only while it is called.
    active: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return next(inside, None) or active


class Company:
    """The ranks that an optimizer trains with; asked anew at each pass and step.

    Args:
        process_group: None for the default one.
        distributed: False: this process trains by itself, whatever else runs.
        reduces: p.grad is averaged over the ranks where no DistributedDataParallel does it.
        communication: "layerwise": one reduction a layer, exact; "two_bucket": two a step, an
            approximation.
        held: The layers' weights get no gradients, for which DistributedDataParallel would wait: it
            is told not to reduce, and the gradients that there are, are averaged here.

    Attributes:
        ranks: As they are now.
        replica: The DistributedDataParallel that runs the model; None for none.
        compared: Steps taken together.

    Raises:
        ValueError: A process group is given where none is used, or this rank is not in it.
    """

    def __init__(
        self,
        process_group: Any = None,
        distributed: bool = True,
        reduces: bool = True,
        held: bool = False,
        communication: str = "layerwise",
    ) -> None:
        check_switch("", "distributed", distributed)
        if communication not in COMMUNICATION:
            raise ValueError(
                f"communication={communication!r}: choose from {', '.join(COMMUNICATION)}"
            )
        if communication == "two_bucket" and held:
            raise ValueError(
                "communication='two_bucket' needs the plain gradients: use weight_gradients=True"
            )
        d = torch.distributed
        if process_group is not None and not distributed:
            raise ValueError("process_group is given with distributed=False: leave one of them out")
        known = process_group is None or (
            d.is_available() and isinstance(process_group, d.ProcessGroup)
        )
        if not known:
            raise ValueError(
                f"process_group={process_group!r}: expected a group that this rank belongs to, as "
                "torch.distributed.new_group returns it"
            )
        self.process_group, self.distributed = process_group, distributed
        self.reduces, self.held = reduces, held
        self.two_bucket = communication == "two_bucket"
        self.ranks = Ranks()
        self.replica: DistributedDataParallel | None = None
        self.compared = 0

    @property
    def due(self) -> bool:
        """The model is to be looked at, and the ranks' weights compared."""
        return self.compared % COMPARE_EVERY == 0

    @property
    def averages(self) -> bool:
        """p.grad is averaged here, when a backward pass has ended."""
        return self.ranks.several and self.reduces and (self.replica is None or self.held)

    def look(self, model: nn.Module) -> None:
        """See who is there.

        Raises:
            UnsupportedModelError: DistributedDataParallel runs a model that is to be trained by
                this process alone, or won't be told not to reduce.
        """
        if not self.distributed and several() and replica(model) is not None:
            raise UnsupportedModelError(
                "distributed=False, but DistributedDataParallel runs the model: its replicas would "
                "drift apart silently; leave one of them away"
            )
        if not self.distributed or not several(self.process_group):
            self.ranks = Ranks() if self.ranks.several else self.ranks
            return
        if not (isinstance(self.ranks, Together) and self.ranks.alive()):
            self.ranks = Together(self.process_group, self.two_bucket)
        self.replica = replica(model) or self.replica
        if self.held and self.replica is not None:
            if self.replica.static_graph:
                raise UnsupportedModelError(
                    "weight_gradients=False with DistributedDataParallel(static_graph=True), which "
                    "insists on reducing every gradient: leave one of them away"
                )
            self.replica.require_backward_grad_sync = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the choices; who is there is looked up anew.

        Raises:
            TypeError: A process group can't leave its process.
        """
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with process_group= can't be pickled, since the group belongs to "
                "this process: save the model's and the optimizer's state_dict instead"
            )
        return {**vars(self), "ranks": Ranks(), "replica": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Company:
        """A company of the same group, for a copied model."""
        copied = object.__new__(Company)
        vars(copied).update(vars(self), ranks=Ranks(), replica=None)
        return copied

    def leave(self) -> None:
        """Let DistributedDataParallel reduce again."""
        if self.held and self.replica is not None:
            self.replica.require_backward_grad_sync = True


def checksum(parameters: Sequence[Tensor]) -> int:
    """Of the weights' bits: equal on ranks whose weights are equal, and else almost surely not."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        p.detach().contiguous().view(widths[p.element_size()]).sum(dtype=torch.int64).cpu()
        for p in parameters
        if not p.is_complex() and p.numel()
    ]
    return zlib.crc32(str([int(one) for one in sums]).encode())
