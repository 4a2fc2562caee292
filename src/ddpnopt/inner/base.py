# SPDX-License-Identifier: MIT
"""How the step of somebody else's optimizer answers its gradient.

Feedback needs two things of an optimizer that it wraps: the gain P of its step, for the recursion,
and that a re-weighted gradient really shortens the step. Optimizers that divide by the size of
their gradients undo any re-weighting unless their second moment is fed with the larger of the
plain and the re-weighted gradient. A reader knows both for a family of optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ddpnopt.hyperparameters import Hyper
from ddpnopt.typing import Tensor

Group = Mapping[str, Any]
State = dict[str, Any]


class Reader(ABC):
    """Reads one family of optimizers; never writes, but for `feed`.

    Attributes:
        rescales: The update of a re-weighted gradient has to be shortened from outside, since
            nothing is known about what the optimizer divides by.
        blank: What a state starts with where that is neither 0 nor the weights.
        moment: The state that `feed` changes; empty if it changes none.
    """

    rescales: bool = False
    blank: Mapping[str, float] = {}
    moment: str = ""

    @abstractmethod
    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """Learning rate over the momentum's life, and curvature, of a group.

        Args:
            group: The optimizer's group.
            gain: What the last update was per gradient, for optimizers that are only watched.
        """

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:  # noqa: B027
        """Before the optimizer's own step on d: its second moment is to see max(plain^2, d^2).

        Args:
            group: The optimizer's group.
            state: The parameter's state.
            plain: The plain gradient, coupled weight decay included.
            d: The re-weighted one, likewise.
        """


def excess(plain: Tensor, d: Tensor) -> Tensor:
    """max(plain^2, d^2) - d^2: exactly 0 where the re-weighted gradient is not smaller."""
    return plain.square().sub_(d.square()).clamp_(min=0)


def feed_average(v: Tensor, decay: float, plain: Tensor, d: Tensor) -> None:
    """Add to v what makes decay v + (1 - decay) d^2 the average of max(plain^2, d^2)."""
    if decay > 0:
        v.add_(excess(plain, d).to(v.dtype), alpha=(1 - decay) / decay)


def coupled(group: Group) -> float:
    """Weight decay that enters the gradient."""
    decay = float(group.get("weight_decay", 0.0))
    return 0.0 if group.get("decoupled_weight_decay", False) else decay
