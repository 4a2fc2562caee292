# SPDX-License-Identifier: MIT
"""Watches the calls of torch functions when a pass is run again: what has become of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddpnopt.crossing import Moved, Path, other_path
from ddpnopt.modes import Quiet, overwritten, results


class Retrace(Quiet):
    """The pass run again.

    Args:
        moved: Collects the tensors that are met.
        path: The nominal pass.
    """

    def __init__(self, moved: Moved, path: Path) -> None:
        super().__init__()
        self.moved, self.path, self.number = moved, Path(), 0
        self.nominal = path.steps[: path.end]

    def end(self) -> None:
        """See no more: an interrupt may have left it in this thread's stack of modes."""
        self.on = False
        self.leave_stack()

    def check(self) -> None:
        """The pass is over.

        Raises:
            UnsupportedModelError: It was another one.
        """
        if self.number != len(self.nominal):
            raise other_path()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Number the call's results; look at those that are waited for.

        Raises:
            UnsupportedModelError: It is not the call that the nominal pass made here.
        """
        step, first = self.path.step(func, args, kwargs), overwritten(func, args, kwargs)
        made = func(*args, **kwargs)
        found = results(made, first)
        if found:
            number, self.number = self.number, self.number + 1
            if number >= len(self.nominal) or self.nominal[number] != step:
                raise other_path()
            self.path.made(found, number)
            self.moved.meet(number, found)
        return made
