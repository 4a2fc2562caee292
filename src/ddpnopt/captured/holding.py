# SPDX-License-Identifier: MIT
"""Passes of a captured loop whose gradients have got into p.grad."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch

from ddpnopt.captured.forward import Pass
from ddpnopt.typing import Tensor

Identity = tuple[int, int] | None


class Held:
    """Collects passes as their backward passes run: they count if p.grad has changed.

    Attributes:
        passes: Those that do, until a step takes them.
    """

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self._during: list[Pass] = []
        self._before: list[tuple[Tensor, Identity]] = []
        self._task: int | None = None

    def taken(self) -> list[Pass]:
        """All of them; they are held no longer."""
        passes, self.passes = self.passes, []
        return passes

    def drop(self) -> None:
        """Their gradients have been used or cleared."""
        for one in self.passes:
            one.found, one.early = {}, None
        self.passes = []

    def drop_stale(self) -> None:
        """Drop passes whose gradients were thrown away (model.zero_grad)."""
        receiving = [p for one in self.passes if one.plan for p in one.plan.receiving]
        if not any(p.grad is not None and bool(p.grad.any()) for p in receiving):
            self.drop()

    def add(self, one: Pass, receiving: Sequence[Tensor]) -> None:
        """A backward pass has reached a pass.

        Args:
            one: The pass.
            receiving: Parameters that it gives gradients to.
        """
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._during = task, []
            self._before = [(p, _identity(p)) for p in receiving]
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(_ended, weakref.ref(self)))
        self._during.append(one)

    def end(self) -> None:
        """The backward pass is over."""
        self._task = None
        during, self._during = self._during, []
        changed = not self._before or any(_identity(p) != old for p, old in self._before)
        self._before = []
        for one in during:
            if not changed:
                one.G.pop()  # torch.autograd.grad
            elif one not in self.passes:
                self.passes.append(one)


def _identity(p: Tensor) -> Identity:
    return None if p.grad is None else (id(p.grad), p.grad._version)


def _ended(ref: weakref.ref[Held]) -> None:
    held = ref()
    if held is not None:
        held.end()
