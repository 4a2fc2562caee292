# SPDX-License-Identifier: MIT
"""What all optimizers with an engine have in common for their user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self, overload

import torch
from torch import nn

from ddpnopt.engine import Engine
from ddpnopt.errors import NonFiniteError
from ddpnopt.options import Options
from ddpnopt.report import StepReport
from ddpnopt.spread import check_ranks


class Shell(torch.optim.Optimizer):
    """An optimizer that belongs to a model's hooks.

    Attributes:
        model: The network.
        options: The choices that hold for all parameters.
        last_step: What the last step did.
    """

    model: nn.Module
    options: Options
    last_step: StepReport | None = None
    _engine: Engine | None = None

    def detach(self) -> None:
        """Remove every hook from the model; the optimizer takes plain steps from then on."""
        self.engine.detach()

    def __enter__(self) -> Self:
        """As a context manager: detaches at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach."""
        self.detach()

    @property
    def engine(self) -> Engine:
        """The machinery behind the step."""
        assert self._engine is not None
        return self._engine

    @property
    def diagnose(self) -> bool:
        """Report |k| and |K dx| of every layer, at the cost of two weight gradients each."""
        return self.engine.diagnose

    @diagnose.setter
    def diagnose(self, on: bool) -> None:
        self.engine.diagnose = on

    @property
    def skipped(self) -> int:
        """Steps skipped because a number was not finite (``nonfinite="skip"``)."""
        return self.engine.skipped

    # Step -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on the recorded passes.

        Args:
            closure: Standard closure that computes the loss and calls ``backward``.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: No backward pass since the last step.
            NonFiniteError: A gradient or a new weight is not finite (``nonfinite="raise"``).
            UnsupportedModelError: The recorded passes can't be handled (named).
            TerminalError: The terminal cost given contradicts the output.
        """
        closure = self._opening(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self.engine
        engine.refresh()
        engine.company.look(self.model)
        device = next(iter(engine.parameters())).device.type
        try:
            ranks, parameters = engine.company.ranks, engine.parameters()
            with torch.autocast(device, enabled=False), ranks.together(parameters):
                check_ranks(engine)
                self.last_step = engine.step(closure)
        except NonFiniteError:
            if self.options.nonfinite == "raise":
                raise
            engine.skipped += 1
            self.last_step = StepReport(self.options.depth, "none", skipped=engine.skipped)
            engine.finish()
        else:
            self._closing(closure)
        return loss

    def _opening(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """Before anything else in a step; the closure to call."""
        return closure

    def _closing(self, closure: Callable[[], float] | None) -> None:
        """After a step that was not skipped."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the recorded passes whose gradients they were."""
        super().zero_grad(set_to_none)
        self.engine.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refused: the copy's parameters would be no model's."""
        raise TypeError(self._copied())

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused likewise."""
        raise TypeError(self._copied())

    def _copied(self) -> str:
        name = type(self).__name__
        return (
            f"a {name} can't be copied or pickled, since it belongs to its model's hooks: copy the "
            f"model, make a new {name} for it, and carry the state over with state_dict"
        )
