# SPDX-License-Identifier: MIT
"""The step alone is recorded and then run without its Python code; the loop stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ddpnopt.captured import calls, passes
from ddpnopt.captured.plan import Outcome, Plan, reported
from ddpnopt.captured.records import Records, Work
from ddpnopt.captured.tracing import Tracer
from ddpnopt.checks import check_states
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.report import Report, StepReport
from ddpnopt.shell import Shell
from ddpnopt.stages import Trajectory
from ddpnopt.taking import take
from ddpnopt.typing import Tensor


class CapturedUpdate(Records):
    """``opt.step()`` of one optimizer, for as long as this is not removed.

    Attributes:
        optimizer: The optimizer.
        replayed: Steps that were run from the record.
        written: Steps that were run as they are written.
        missed: Those of them whose decisions were not those of the record.
        compiles: Records are compiled; no longer so once torch's compiler has failed.
        reason: Why no step is run from a record any more; empty while they are.

    Args:
        optimizer: A `DDPNOpt`, or what else has its engine.
        compile: Compile the records by torch's compiler.
    """

    # A step sees less than an iteration: what the model does between its layers, say.
    what, compare_every = "step", 100

    def __init__(self, optimizer: Shell, *, compile: bool = False) -> None:
        super().__init__(optimizer, compile=compile)
        optimizer.engine.shortcut = self

    def remove(self) -> None:
        """From now on steps run as they are written."""
        if self.optimizer.engine.shortcut is self:
            self.optimizer.engine.shortcut = None

    def __call__(self, trajectories: list[Trajectory]) -> Report:
        """Take a step on passes whose gradients have not been changed since.

        Raises:
            Exception: As the step does.
        """
        made = self._step(trajectories)
        self._say(stacklevel=6)
        return made

    def _step(self, trajectories: list[Trajectory]) -> Report:
        engine = self.optimizer.engine
        if self.reason or len(trajectories) > 1 or not self._intact(trajectories):
            self.written += 1
            return take(engine, trajectories)
        inputs = [t for one in trajectories for t in passes.tensors(one)]
        inputs += passes.gradients(engine)
        kind = (*map(passes.facts, trajectories), *map(calls.kind_of, inputs))
        # Runs from a record move the weights back and forth: their versions tell nothing then.
        written = partial(take, engine, trajectories, intact=True)
        made: Report = self._run(Work(kind, inputs, written, lambda: (inputs, written)))
        return made

    def _intact(self, trajectories: list[Trajectory]) -> bool:
        """Whether a step on these passes is one like others; the code says what is wrong."""
        if any(t.error is not None or t.refusal or not t.owned for t in trajectories):
            return False
        try:
            check_states(trajectories, self.optimizer.options.closed_loop)
        except UnsupportedModelError:
            return False
        return True

    def _report(self, made: Any) -> tuple[Any, StepReport | None]:
        return None, made

    def _object(self, tracer: Tracer, made: Any, inputs: Sequence[Tensor | None]) -> None:
        known = [t for t in inputs if t is not None]
        known += [t for m in self._modules for t in (*m.parameters(False), *m.buffers(False))]
        tracer.refuse_others([*known, *self.optimizer.engine.copies.values()], reported(made))

    def _keep(self, plan: Plan, outcome: Outcome) -> Callable[[], StepReport | None]:
        plan.commit(outcome)
        self.optimizer.engine.finish()
        return outcome.report
