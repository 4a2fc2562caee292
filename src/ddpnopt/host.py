# SPDX-License-Identifier: MIT
"""What an engine asks of the optimizer that it serves."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ddpnopt.borrowed import Borrowed
from ddpnopt.hyperparameters import hyperparameters, needs_squares
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.engine import Engine


class Host(ABC):
    """The optimizer behind an engine, seen from inside; it is asked anew at each use.

    Attributes:
        sharded: Its parameters are spread over the ranks, and so are their gradients' means.
    """

    sharded = False

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """All parameters, whether frozen or not."""

    @abstractmethod
    def borrow(self, copies: dict[int, Tensor]) -> Borrowed:
        """What makes this step's updates.

        Args:
            copies: Memory kept from step to step.
        """

    @abstractmethod
    def commit(self, borrowed: Borrowed) -> None:
        """Keep what the step has done."""

    def squares(self) -> bool:
        """Whether a curvature is fed with the samples' squared gradients."""
        return False

    def begin(self) -> None:  # noqa: B027
        """A backward pass has begun."""

    def check_pass(self) -> None:  # noqa: B027
        """Refuse a backward pass that has ended.

        Raises:
            UnsupportedModelError: Its gradients are not what they are taken for.
        """

    def whole(self, engine: Engine) -> AbstractContextManager[None]:
        """A block in which parameters and gradients that are spread over the ranks are whole."""
        return nullcontext()


class OwnGroups(Host):
    """An optimizer whose groups name their curvature, and whose state is the curvature's.

    Args:
        optimizer: Held weakly: the engine must not keep a dropped optimizer recording.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        return optimizer.param_groups if optimizer is not None else []

    def parameters(self) -> list[Tensor]:
        """Of all groups."""
        return [p for group in self._groups() for p in group["params"]]

    def borrow(self, copies: dict[int, Tensor]) -> Borrowed:
        """The curvatures' own updates."""
        optimizer = self._optimizer()
        state = optimizer.state if optimizer is not None else {}
        return Borrowed(hyperparameters(self._groups()), state, copies)

    def commit(self, borrowed: Borrowed) -> None:
        """Write the new state."""
        optimizer = self._optimizer()
        if optimizer is not None:
            borrowed.commit(optimizer.state)

    def squares(self) -> bool:
        """As the groups' curvatures want it."""
        return any(needs_squares(group["curvature"]) for group in self._groups())
