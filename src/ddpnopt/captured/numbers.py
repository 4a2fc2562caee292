# SPDX-License-Identifier: MIT
"""The optimizer's numbers as tensors: learning rates, counters, running ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ddpnopt.captured.recording import Slot
from ddpnopt.hyperparameters import curvatures
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor


class Rates:
    """The groups' learning rates, as tensors that every run finds up to date.

    Args:
        optimizer: Its groups say what they are; schedulers and users go on writing there.

    Attributes:
        tensors: One for each group.
    """

    def __init__(self, optimizer: Shell) -> None:
        self._optimizer = optimizer
        self.tensors: list[Tensor] = []
        self._known: list[float] = []

    @property
    def numbers(self) -> list[float]:
        """As the groups have them."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def update(self) -> list[float]:
        """Write what the groups say into the tensors, and return it."""
        now = self.numbers
        if len(now) != len(self.tensors):
            self.tensors = [_room(group["params"]) for group in self._optimizer.param_groups]
            self._known = []
        if now != self._known:
            for rate, value in zip(self.tensors, now, strict=True):
                rate.fill_(value)
            self._known = now
        return now

    @contextmanager
    def in_groups(self) -> Iterator[None]:
        """Within the block the groups have the tensors."""
        groups = self._optimizer.param_groups
        before = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.tensors, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr


class State:
    """The optimizer's state, as far as steps write to it.

    Args:
        optimizer: The optimizer.

    Attributes:
        tensors: Its places, with the tensors that are there; numbers have become tensors.
        counts: Places of the numbers that the host goes by, with these.
    """

    def __init__(self, optimizer: Shell) -> None:
        self.tensors: list[tuple[Slot, Tensor]] = []
        self.counts: list[tuple[Slot, int]] = []
        self._numbers: list[tuple[Slot, type]] = []
        self._optimizer, self._places = optimizer, 0
        for slot, device in _places(optimizer):
            self._places += 1
            value = slot.found
            if slot.counts:
                self.counts.append((slot, value))
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                wide = torch.float32 if device.type == "mps" else torch.float64
                slot.put(torch.tensor(float(value), dtype=wide, device=device))
                self._numbers.append((slot, type(value)))
            if isinstance(slot.found, torch.Tensor):
                self.tensors.append((slot, slot.found))

    def grown(self) -> bool:
        """Whether a step has made state that was not there before, which no place is known of."""
        return sum(1 for _ in _places(self._optimizer)) != self._places

    def computed(self) -> list[str]:
        """Names of what has been replaced by a number: the host has computed it."""
        return [str(s.key) for s, _ in self._numbers if not isinstance(s.found, torch.Tensor)]

    def as_numbers(self) -> None:
        """What was a number is one again."""
        for slot, kind in self._numbers:
            slot.put(kind(slot.found))


def _places(optimizer: Shell) -> Iterator[tuple[Slot, torch.device]]:
    known = curvatures(optimizer.param_groups)
    for p, state in optimizer.state.items():
        counts, basis = (known[p].counts, known[p].basis) if p in known else ((), ())
        holder = partial(_of, optimizer, p)
        for name in list(state):
            yield Slot(holder, name, name in counts, name in basis), p.device
    engine = optimizer.engine
    device = engine.parameters()[0].device
    holder = partial(_running, optimizer)
    for name in list(engine.running):
        yield Slot(holder, name), device
    for inner in getattr(optimizer, "inners", ()):
        holder = partial(getattr, inner, "gains")
        for p in list(inner.gains):
            yield Slot(holder, p), p.device


def _of(optimizer: Shell, p: Tensor) -> dict[Any, Any]:
    """A parameter's state, wherever it is now: loading replaces it."""
    found: dict[Any, Any] = optimizer.state.get(p, {})
    return found


def _running(optimizer: Shell) -> dict[Any, Any]:
    """The running coupling, wherever it is now."""
    return optimizer.engine.running


def _room(parameters: Sequence[Tensor]) -> Tensor:
    """Room for a learning rate, as exact as the widest parameter."""
    wide = torch.float32
    for p in parameters:
        wide = torch.promote_types(wide, p.dtype)
    device = parameters[0].device if parameters else None
    return torch.zeros((), dtype=wide, device=device)
