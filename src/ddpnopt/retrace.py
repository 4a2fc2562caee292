# SPDX-License-Identifier: MIT
"""Watches the calls of torch functions when a pass is run again: what has become of its tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ddpnopt.crossing import Moved, Path, other_path
from ddpnopt.modes import DIFFERENTIATING, Quiet, overwritten, results
from ddpnopt.typing import Tensor


class Retrace(Quiet):
    """The pass run again.

    Args:
        moved: Collects the tensors that are met.
        path: The nominal pass.
    """

    def __init__(self, moved: Moved, path: Path) -> None:
        super().__init__()
        self.moved, self.path, self.number = moved, Path(), 0
        self.nominal, self.answers = path.steps[: path.end], path.asked
        self.grad = path.differentiates

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

    def asked(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """What the nominal pass has answered: here is a graph only where gradients are taken."""
        if func in DIFFERENTIATING or self.grad:
            return func(*args, **kwargs)
        if name == "register_hook":
            return RemovableHandle(OrderedDict())
        if name == "retain_grad":
            return None
        number = self.path.number(args[0])
        known = None if number is None else self.answers.get((number, name))
        return func(*args, **kwargs) if known is None else known

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Number the call's results; look at those that are waited for.

        Raises:
            UnsupportedModelError: It is not the call that the nominal pass made here.
        """
        if func is Tensor.view_as and args[0] is args[-1] and torch.is_grad_enabled():
            if not self.grad:  # torch looks for a node of the graph, which this pass has not got
                leaf = args[0].detach().requires_grad_()
                return func(leaf, leaf)
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
