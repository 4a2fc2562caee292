# SPDX-License-Identifier: MIT
"""The step alone is recorded and then run without its Python code; the loop stays as it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ddpnopt.captured import calls, passes
from ddpnopt.captured.calls import Work
from ddpnopt.captured.plan import Plan
from ddpnopt.captured.recording import Outcome, reported, told
from ddpnopt.captured.records import Records
from ddpnopt.captured.tracing import Tracer
from ddpnopt.checks import check_states
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.report import Report, StepReport
from ddpnopt.reweighting import Reweighing, reweighing
from ddpnopt.shell import Shell
from ddpnopt.shortcuts import Shortcut
from ddpnopt.stages import Trajectory
from ddpnopt.taking import take
from ddpnopt.typing import Tensor


class _OfPasses(Records):
    """Records of what is done with recorded passes."""

    #: Less is seen of a pass than of an iteration: not what the model does between its layers, say.
    compare_every = 100

    def _on(self, trajectories: list[Trajectory], written: Callable[[], Any]) -> Any:
        """Do it with these passes; ``written`` does it as it is written."""
        engine = self.optimizer.engine
        inputs = [t for one in trajectories for t in passes.tensors(one)]
        inputs += passes.gradients(engine)
        kind = (*map(passes.facts, trajectories), *map(calls.kind_of, inputs))
        # A step draws in the second forward pass alone, which begins as the first has begun.
        again = [one.call for one in trajectories if one.call is not None]
        generator = again[0].randomness.torch_cpu if again else None
        work = Work(kind, inputs, written, lambda: (inputs, written), generator)
        return self._run(work) if self._hashable(kind) else self._as_written(work)

    def _obstacle(self, inputs: Sequence[Tensor | None]) -> str:
        if any(t is not None and t.layout != torch.strided for t in inputs):
            return "a gradient is sparse"
        return super()._obstacle(inputs)

    def _object(self, tracer: Tracer, made: Any, inputs: Sequence[Tensor | None]) -> None:
        known = [t for m in self._modules for t in (*m.parameters(False), *m.buffers(False))]
        known += self.optimizer.engine.copies.values()
        tracer.refuse_others(known, reported(self._report(made)[1]))


class _Steps(_OfPasses):
    """Records of the step."""

    what = "step"

    def take(self, trajectories: list[Trajectory]) -> Report:
        """A step on these passes."""
        engine = self.optimizer.engine
        if self.reason or len(trajectories) > 1 or not self._intact(trajectories):
            self.written += 1
            return take(engine, trajectories)
        # Runs from a record move the weights back and forth: their versions tell nothing then.
        made: Report = self._on(trajectories, partial(take, engine, trajectories, intact=True))
        return made

    def _intact(self, trajectories: list[Trajectory]) -> bool:
        """Whether a step on these passes is one like others; the code says what is wrong."""
        if any(t.error is not None or t.refusal or not t.owned for t in trajectories):
            return False
        try:
            check_states(trajectories, self.optimizer.options.closed_loop)
            for one in trajectories:
                if one.call is not None:
                    one.call.check_inputs()
        except UnsupportedModelError:
            return False
        return True

    def _report(self, made: StepReport) -> tuple[Any, StepReport | None]:
        return None, made

    def _keep(self, plan: Plan, outcome: Outcome) -> Callable[[], StepReport | None]:
        plan.commit(outcome)
        engine = self.optimizer.engine
        engine.rescale = 1.0
        engine.finish()
        return told(outcome, self.optimizer.skipped)


class _Reweighings(_OfPasses):
    """Records of what open loop adds to p.grad."""

    what = "re-weighting"

    def reweigh(self, trajectories: list[Trajectory]) -> Reweighing:
        """What these passes add."""
        engine = self.optimizer.engine
        written = partial(reweighing, engine, trajectories)
        if self.reason or len(trajectories) > 1 or engine.base or engine.rescale != 1.0:
            self.written += 1
            return written()
        made: Reweighing = self._on(trajectories, written)
        return made

    def _report(self, made: Reweighing) -> tuple[Any, StepReport | None]:
        return (made.found, made.kept), made.report

    def _seen(self, asked: Any) -> Any:
        found, kept = asked  # what is added may be nothing but rounding
        return {p: p.grad + d for p, d in found.items()}, kept

    def _keep(self, plan: Plan, outcome: Outcome) -> Reweighing:
        plan.commit(outcome)
        report = told(outcome, self.optimizer.skipped)()
        assert report is not None
        found, kept = outcome.made
        return Reweighing(found, kept, report)


class CapturedUpdate(Shortcut):
    """``opt.step()`` of one optimizer, run from a record for as long as this is not removed.

    In open loop what ``backward`` adds to p.grad is recorded, too.

    Attributes:
        replayed: Steps that were run from the record, with all of their parts.
        written: Steps some part of which was run as it is written.

    Args:
        optimizer: A `DDPNOpt`, or what else has its engine.
        compile: Compile the records by torch's compiler.

    Raises:
        TypeError: The optimizer is none of this package.
    """

    def __init__(self, optimizer: Shell, *, compile: bool = False) -> None:
        calls.check_optimizer(optimizer)
        # The optimizer holds this: no cycle, or its hooks would outlive it until it is collected.
        seen = weakref.proxy(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self.replayed = self.written = 0
        self._written = 0, 0
        self._steps = _Steps(seen, compile=compile)
        self._reweighings = _Reweighings(seen, compile=compile)
        optimizer.engine.shortcut = self

    @property
    def optimizer(self) -> Shell | None:
        """The optimizer; None once it is gone."""
        return self._optimizer()

    def remove(self) -> None:
        """From now on steps run as they are written."""
        optimizer = self.optimizer
        if optimizer is not None and optimizer.engine.shortcut is self:
            optimizer.engine.shortcut = None

    @property
    def missed(self) -> int:
        """Parts of steps whose decisions were not those of the record."""
        return self._steps.missed + self._reweighings.missed

    @property
    def compiles(self) -> bool:
        """Records are compiled; no longer so once torch's compiler has failed."""
        return self._steps.compiles and self._reweighings.compiles

    @property
    def reason(self) -> str:
        """Why some part is not run from a record any more; empty while all are."""
        return self._steps.reason or self._reweighings.reason

    def take(self, trajectories: list[Trajectory]) -> Report:
        """A step on passes whose gradients have not all been rescaled since.

        Raises:
            Exception: As the step does.
        """
        made = self._steps.take(trajectories)
        whole = self._steps.written == self._written[0]
        if whole and self._reweighings.written == self._written[1]:
            self.replayed += 1
        else:
            self.written += 1
        self._written = self._steps.written, self._reweighings.written
        self._steps.say(stacklevel=7)
        return made

    def reweigh(self, trajectories: list[Trajectory]) -> Reweighing:
        """What open loop adds to p.grad.

        Raises:
            Exception: As the code does.
        """
        made = self._reweighings.reweigh(trajectories)
        self._reweighings.say(stacklevel=3)
        return made
