# SPDX-License-Identifier: MIT
"""What all optimizers with an engine have in common for their user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self, overload

import torch
from torch import nn

from ddpnopt.binding import check_bound
from ddpnopt.company import Company
from ddpnopt.engine import Engine
from ddpnopt.errors import NonFiniteError
from ddpnopt.options import Options
from ddpnopt.report import Report, StepReport
from ddpnopt.spread import check_ranks


class Shell(torch.optim.Optimizer):
    """An optimizer that belongs to a model's hooks.

    Attributes:
        model: The network; a module without parameters until it is known.
        options: The choices that hold for all parameters.
    """

    model: nn.Module
    options: Options
    #: Attributes that copies take over.
    _kept: ClassVar[tuple[str, ...]] = ("model", "options", "_company")
    _company: Company
    _report: Report | None = None
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
    def last_step(self) -> StepReport | None:
        """What the last step did."""
        if callable(self._report):
            self._report = self._report()
        return self._report

    @last_step.setter
    def last_step(self, report: Report | None) -> None:
        self._report = report

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
        try:
            made = engine.shortcut.step(closure) if engine.shortcut is not None else None
            self.last_step = self._step(closure) if made is None else made
        except NonFiniteError:
            if self.options.nonfinite == "raise":
                raise
            engine.skipped += 1
            self.last_step = StepReport(self.options.depth, "none", skipped=engine.skipped)
            engine.finish()
        else:
            self._closing(closure)
        return loss

    def _step(self, closure: Callable[[], float] | None) -> Report:
        """Take a step as it is written."""
        engine = self.engine
        engine.refresh()
        engine.company.look(self.model)
        ranks, parameters = engine.company.ranks, engine.parameters()
        device = parameters[0].device.type
        with torch.autocast(device, enabled=False), ranks.together(parameters):
            check_bound(engine.waiting and engine.records)
            check_ranks(engine)
            return engine.step(closure)

    def _opening(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """Before anything else in a step; the closure to call."""
        return closure

    def _closing(self, closure: Callable[[], float] | None) -> None:
        """After a step that was not skipped."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the recorded passes whose gradients they were."""
        super().zero_grad(set_to_none)
        self.engine.forget()

    # Copies ---------------------------------------------------------------------------------

    def _make_engine(self) -> Engine:
        """A new engine for the model."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: with the model, so that both together stay a pair."""
        kept = {name: value for name, value in vars(self).items() if name in self._kept}
        return {"own": kept, "torch": self._torch_state(), "engine": _packed(self.engine)}

    def _torch_state(self) -> dict[str, Any]:
        """What the base class keeps."""
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hooks on the copied model."""
        if "engine" not in state:  # torch's load_state_dict comes this way
            super().__setstate__(state)
            return
        vars(self).update(state["own"])
        super().__setstate__(state["torch"])
        self._engine = self._make_engine()
        _unpack(self._engine, state["engine"])

    def __copy__(self) -> NoReturn:
        """Refused: two optimizers would step on one state."""
        name = type(self).__name__
        raise TypeError(
            f"a {name} can't be copied by half: copy.deepcopy copies it with its model; or make a "
            f"new {name} and carry the state over with state_dict"
        )


def _packed(engine: Engine) -> dict[str, Any]:
    detached = engine.records and engine.recorder is None and not engine.waiting
    return {
        "chosen": (engine.method, engine.needs_cost, engine.diagnose),
        "outputs": engine.outputs,
        "detached": detached,
        "state": engine.state_dict(),
    }


def _unpack(engine: Engine, packed: dict[str, Any]) -> None:
    engine.method, engine.needs_cost, engine.diagnose = packed["chosen"]
    engine.outputs = packed["outputs"]
    engine.notices = engine.outputs.notices
    engine.load_state_dict(packed["state"])
    if packed["detached"]:
        engine.detach()
