# SPDX-License-Identifier: MIT
"""Putting things back so that an interrupt (Ctrl-C) can't leave them half-way.

Python may raise KeyboardInterrupt between any two calls, also inside `contextlib.ExitStack` and
between a change and the note of it. So what undoes a change is noted before the change is made, may
be done again at any point, and begins anew if it is interrupted itself.
"""

from __future__ import annotations

from collections.abc import Callable


def insist(action: Callable[[], object]) -> None:
    """Run an action to its end: what interrupts it is raised afterwards.

    Args:
        action: May be begun again at any point of it.
    """
    try:
        action()
    except BaseException:
        action()
        raise


class Undoing:
    """A block's changes to the world outside, undone when it is left, the last one first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def add(self, action: Callable[[], object]) -> None:
        """Note what undoes a change, before the change.

        Args:
            action: May be done without the change, and more than once.
        """
        self._actions.append(action)

    def run(self) -> None:
        """Undo everything now."""
        for action in reversed(self._actions):
            action()
        self._actions.clear()

    def __enter__(self) -> Undoing:
        """Begin the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo everything."""
        insist(self.run)
