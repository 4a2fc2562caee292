# SPDX-License-Identifier: MIT
"""What an engine asks of whoever steps somebody else's optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

from ddpnopt.borrowed import Borrowed
from ddpnopt.host import Host
from ddpnopt.narrowed import Inner
from ddpnopt.typing import Tensor
from ddpnopt.wrapped import Wrapped


class Wrapper(Protocol):
    """What has inner optimizers."""

    @property
    def trust(self) -> bool | float:
        """As for `Feedback`."""

    @property
    def inners(self) -> tuple[Inner, ...]:
        """The optimizers with what is known about them."""


class Guest(Host):
    """A `Feedback` or an open loop, held weakly, seen from its engine."""

    def __init__(self, owner: Wrapper) -> None:
        self._owner = weakref.ref(owner)

    def _inners(self) -> Sequence[Inner]:
        owner = self._owner()
        return owner.inners if owner is not None else ()

    def parameters(self) -> list[Tensor]:
        """Of all wrapped optimizers."""
        return [p for inner in self._inners() for p in inner.parameters()]

    def borrow(self, copies: dict[int, Tensor]) -> Borrowed:
        """The wrapped optimizers' own updates."""
        owner = self._owner()
        return Wrapped(self._inners(), copies, owner is not None and owner.trust)

    def commit(self, borrowed: Borrowed) -> None:
        """Counters and gains."""
        borrowed.commit({})
