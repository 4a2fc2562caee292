# SPDX-License-Identifier: MIT
"""What may do an engine's work in another way; `ddpnopt.captured` does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ddpnopt.report import Report
from ddpnopt.stages import Trajectory

if TYPE_CHECKING:
    from ddpnopt.reweighting import Reweighing


class Shortcut(ABC):
    """Does what the engine does in another way (`ddpnopt.capture`)."""

    @abstractmethod
    def take(self, trajectories: list[Trajectory]) -> Report:
        """As `taking.take`, on gradients that have not all been rescaled."""

    @abstractmethod
    def reweigh(self, trajectories: list[Trajectory]) -> Reweighing:
        """As `reweighting.reweighing`."""

    @abstractmethod
    def remove(self) -> None:
        """The engine does its work itself from now on."""

    def enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it runs this call of a module, so that nothing is to be recorded of it."""
        return False

    def leaves(self, module: nn.Module, output: Any, replaced: Any) -> Any:
        """A call that begins a pass has ended, as it is written.

        Args:
            module: What was called.
            output: What it returns; None where it failed.
            replaced: The same, if that is not what its code has returned.

        Returns:
            What is to be returned instead of what its code has returned, or None.
        """
        return replaced

    def step(self, closure: Callable[[], float] | None) -> Report | None:
        """A step on passes that it has run; None: the engine has now got what it needs for one."""
        return None

    def forget(self) -> None:  # noqa: B027
        """Gradients have been used or cleared: so are the passes they came from."""
