# SPDX-License-Identifier: MIT
"""The curvature M_t that the recursion borrows: Q_uu = M_t / eta (Table 2).

A curvature is a frozen set of options; its state lives in ``optimizer.state[p]`` and is passed
in and returned. A new curvature is one file here and one row in the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ddpnopt.typing import Tensor

State = Mapping[str, Any]
#: A learning rate; a tensor without dimensions while a step is traced (`ddpnopt.capture`).
Rate = float | Tensor


class Curvature(ABC):
    """M_t of one parameter, and the borrowed optimizer's own step with it.

    A curvature of whole layers is a `curvature.kronecker.Joint`, which is this, too, for parameters
    that it can't join.
    """

    #: The name users write and ``param_groups`` carry.
    name: ClassVar[str]
    #: Weight decay acts on the weights directly, and enters neither d nor the statistics.
    decoupled: ClassVar[bool] = False
    #: Heavy-ball momentum may be added (AdamW has its own).
    heavy_ball: ClassVar[bool] = True
    #: The factor on the Moreau envelope's S that suits it, where the user names none (measured).
    strength: ClassVar[float] = 1.0
    #: M depends on the weights, too: the state that is read has them as "weights", eta / (1 - mu)
    #: as "rate", and as "layers" how many weights with two dimensions or more are trained.
    relative: ClassVar[bool] = False
    #: Whole numbers in the state that say what a step does; they stay numbers while it is traced.
    counts: ClassVar[tuple[str, ...]] = ()
    #: What of the state is in a basis of eigenvectors: rounding may turn it, to the same M.
    basis: ClassVar[tuple[str, ...]] = ()

    @property
    def statistics(self) -> str:
        """What feeds M: "none", "gradient" (of the batch) or "squares" (of each sample)."""
        return "none"

    @abstractmethod
    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> Tensor | None:
        """M's statistics after this step's gradient, without storing them.

        Args:
            state: The parameter's state, read only.
            gradient: Gradient of the batch, weight decay included.
            squares: Mean over samples of the squared gradient, in the batch gradient's units.
        """

    @abstractmethod
    def inverse(self, state: State, moment: Tensor | None) -> Tensor | None:
        """The diagonal of M^-1 at this step; None for the identity."""

    @abstractmethod
    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: Rate, momentum: float
    ) -> dict[str, Any]:
        """Apply u <- u - eta M^-1 d in place; returns the parameter's new state.

        The order of operations is the borrowed torch optimizer's, so that equal d give equal bits.
        While a step is traced numbers in the state, but `counts`, are tensors without dimensions.
        """

    def kind(self, state: State) -> Hashable:
        """What the coming step does that not every step does; None where that is not settled yet.

        Steps of one kind are the same operators, with the same numbers in them.
        """
        return ()

    def follow(
        self, state: State, gradient: Tensor, d: Tensor, moment: Tensor | None
    ) -> Tensor | None:
        """Statistics to store once the re-weighted gradient d is known (default: as they are)."""
        return moment


def momentum_step(
    p: Tensor, direction: Tensor, state: State, lr: float | Tensor, momentum: float
) -> dict[str, Any]:
    """b <- mu b + direction, u <- u - eta b, in place; returns what is new in the state."""
    if momentum == 0:
        descend(p, direction, lr)
        return {}
    buffer = state.get("momentum_buffer")
    buffer = direction.clone() if buffer is None else buffer.mul(momentum).add_(direction)
    descend(p, buffer, lr)
    return {"momentum_buffer": buffer}


def descend(p: Tensor, direction: Tensor, rate: float | Tensor) -> None:
    """u <- u - rate direction, in place."""
    if isinstance(rate, Tensor):
        p.sub_(direction * rate.to(direction.dtype))
    else:
        p.add_(direction, alpha=-rate)


def descend_all(parameters: list[Tensor], directions: list[Tensor], rate: float | Tensor) -> None:
    """u <- u - rate direction for several parameters, in one fused call."""
    if isinstance(rate, Tensor):
        torch._foreach_sub_(parameters, torch._foreach_mul(directions, rate))
    else:
        torch._foreach_add_(parameters, directions, alpha=-rate)


def descend_quotient(p: Tensor, d: Tensor, M: Tensor, rate: float | Tensor) -> None:
    """u <- u - rate d / M, in place."""
    if isinstance(rate, Tensor):
        p.sub_((d * rate.to(d.dtype)).div_(M))
    else:
        p.addcdiv_(d, M, value=-rate)


def seen(moment: Tensor) -> Tensor:
    """A copy of a second moment, infinite where it is 0: there M^-1 is 0, not 1 / eps.

    One pass; a mask, which has no vectorised kernel on CPUs, takes as long as a dozen.
    """
    return F.threshold(moment, 0.0, float("inf"))


def larger(first: Tensor, second: Tensor) -> Tensor:
    """The larger absolute value of each entry."""
    size = first.abs()
    return torch.maximum(size, second.abs(), out=size)
