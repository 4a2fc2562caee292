# SPDX-License-Identifier: MIT
"""A plain loop whose forward pass, backward pass and step are run from a record."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpnopt.captured import calls
from ddpnopt.captured.calls import Work
from ddpnopt.captured.forward import Forward, Pass, attach, watch
from ddpnopt.captured.phased import PhasedPlan
from ddpnopt.captured.plan import Outcome, Plan, Recording
from ddpnopt.captured.records import MISSES, POSTPONED, WARM, Records
from ddpnopt.captured.rerunning import Rerun
from ddpnopt.captured.tracing import Tracer
from ddpnopt.engine import Shortcut
from ddpnopt.inert import Hook
from ddpnopt.randomness import drawing
from ddpnopt.report import Report, StepReport
from ddpnopt.reweighting import Reweighing, reweighing
from ddpnopt.shell import Shell
from ddpnopt.stages import Trajectory
from ddpnopt.taking import take
from ddpnopt.typing import Tensor

#: Places of tensors among those that the model returns.
Identity = tuple[int, int] | None


class CapturedLoop(Records, Shortcut):
    """The iterations of a plain loop, run from a record for as long as this is not removed.

    The model's forward pass, ``backward`` and ``opt.step()`` are recorded together and run in three
    parts; what the loop does in between, the loss first of all, is its own.

    Attributes:
        optimizer: The optimizer.
        replayed: Steps that were run from the record.
        written: Steps that were run as they are written.
        missed: Those of them whose decisions were not those of the record.
        compiles: Records are compiled; no longer so once torch's compiler has failed.
        reason: Why nothing is run from a record any more; empty while it is.

    Args:
        optimizer: A `DDPNOpt`, or what else has its engine.
        compile: Compile the records by torch's compiler.

    Raises:
        TypeError: The optimizer is none of this package.
    """

    what = "iteration"
    #: What the model does besides operators on tensors is known from the recording alone.
    compare_every = 100

    def __init__(self, optimizer: Shell, *, compile: bool = False) -> None:
        calls.check_optimizer(optimizer)
        # The optimizer holds this: no cycle, or its hooks would outlive it until it is collected.
        super().__init__(weakref.proxy(optimizer), compile=compile)
        engine = optimizer.engine
        self._net, self._token = engine.model, torch.zeros((), requires_grad=True)
        #: The call that comes is run from this record.
        self._due: tuple[Pass, PhasedPlan] | None = None
        #: The pass that runs as it is written, of which a record is to be made or compared.
        self._waiting: tuple[tuple[Any, Any], Pass] | None = None
        #: Passes from the record in the backward pass that runs; and those whose gradients are in
        #: p.grad.
        self._during: list[Pass] = []
        self._held: list[Pass] = []
        self._before: list[tuple[Tensor, Identity]] = []
        self._task: int | None = None
        self._rerun = Rerun(weakref.proxy(optimizer), self._net)
        self._unused = self._several = 0
        self._forward = Forward(self, self._net)
        self._net.forward = self._forward
        engine.shortcut = self

    def remove(self) -> None:
        """From now on everything runs as it is written."""
        self._forward.remove()
        try:
            engine = self.optimizer.engine
        except ReferenceError:  # the optimizer is gone
            return
        if engine.shortcut is self:
            engine.shortcut = None

    # Forward pass ------------------------------------------------------------------------------

    def enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call of the model is run from the record."""
        self._due, engine = None, self.optimizer.engine
        if module is not self._net or self._rerun.runs or self.reason:
            return False
        one = Pass.of(args, kwargs)
        recorder = engine.recorder
        if not self._hashable(one.kind) or recorder is None or recorder.anatomy.outdated():
            return False
        self._watch_settings()
        step = calls.kind_of_step(self.optimizer, self._curvatures) if self._curvatures else ()
        key = one.kind, step
        plan = self._plans.get(key)
        usual = step is not None and self._usual(self._asked(one)) and engine.rescale == 1.0
        if plan is not None and not plan.current():
            self._forget(one.kind)
            plan = None
        if usual and isinstance(plan, PhasedPlan) and plan.verified:
            if plan.runs - plan.compared < self.compare_every:
                self._due = one, plan
                return True
        self._waiting = None
        if plan is None and (self._warm.get(one.kind, 0) < WARM or self._crowded(one.kind)):
            self._warm_up(one.kind)
        elif usual and 0 not in self._rates.numbers:
            one.prepare(self._modules)
            self._waiting = key, one
            self._unused += 1
            if self._unused > POSTPONED:
                self._give_up("gradients are rescaled, or several passes belong to a step")
        return False

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward pass."""
        due, self._due = self._due, None
        if due is None:
            made = self._forward.method(*args, **kwargs)
            if self._waiting is not None and not self._rerun.runs and torch.is_grad_enabled():
                watch(self._waiting[1], made)
            return made
        one, plan = due
        one.plan = plan
        one.weights = self._rerun.weights()
        one.generator = torch.get_rng_state() if plan.random else None
        one.buffers = [(b, b.detach().clone()) for b in plan.buffers]
        self._rates.update()
        outputs, saved = plan.forward(plan.given(0, one.tensors), self._rates.tensors)
        return plan.output(attach(self, one, outputs, saved, self._token))

    # Backward pass -----------------------------------------------------------------------------

    def backward(
        self, one: Pass, saved: Sequence[Tensor], G: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The parameters' gradients.

        Raises:
            RuntimeError: An output has a gradient that had none in the recording.
        """
        plan, first = one.plan, len(one.tensors)
        assert plan is not None
        expected = plan.there[first : first + len(G)]
        if any(g is not None and not there for g, there in zip(G, expected, strict=True)):
            self._give_up("the loss is of other outputs of the model than in the recording")
            raise RuntimeError(
                "capture: the loss is of other outputs of the model than when the iteration was "
                "recorded; run the forward pass again: from now on it runs as it is written"
            )
        one.check_inputs()
        self._begin(plan)
        given = [None if g is None else g.detach() for g in G]
        one.odd = one.odd or any(g is None and there for g, there in zip(G, expected, strict=True))
        one.G.append(given)
        filled = [
            torch.zeros(plan.shapes[i], dtype=plan.dtypes[i], device=self._token.device)
            if g is None and there
            else g
            for i, (g, there) in enumerate(zip(given, expected, strict=True))
        ]
        self._rates.update()
        found = plan.given(0, one.tensors) | plan.given(first, filled)
        grads, one.found = plan.backward(saved, found, self._rates.tensors)
        self._during.append(one)
        return grads

    def _begin(self, plan: PhasedPlan) -> None:
        """A backward pass has reached a pass: note what p.grad holds before it."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task, self._during = task, []
        if self._held and not any(p.grad is not None and p.grad.any() for p in plan.receiving):
            self._held = []  # thrown away by model.zero_grad()
        self._before = [(p, _identity(p)) for p in plan.receiving]
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(_ended, weakref.ref(self)))

    def end(self) -> None:
        """A backward pass is over: it counts if it has changed p.grad."""
        self._task = None
        during, self._during = self._during, []
        changed = not self._before or any(_identity(p) != old for p, old in self._before)
        for one in during:
            if not changed:
                one.G.pop()
            elif one not in self._held:
                self._held.append(one)

    def forget(self) -> None:
        """Gradients have been used or cleared."""
        self._held = []

    # Step --------------------------------------------------------------------------------------

    def step(self, closure: Any) -> Report | None:
        """A step on passes that were run from the record."""
        held, self._held = self._held, []
        if not held:
            return None
        engine = self.optimizer.engine
        one = held[0]
        assert one.plan is not None and engine.recorder is not None
        grads = [p.grad for p in engine.parameters()]
        alone = (
            len(held) == len(one.G) == 1 and not one.odd and not engine.recorder.arrivals.completed
        )
        there = one.plan.there[-len(grads) :]
        like = [g is not None and g.layout == torch.strided for g in grads] == there
        if closure is None and alone and like:
            self._several = 0
            outcome = self._outcome(one, one.plan, grads)
            if outcome is not None:
                return outcome
        else:
            self._several += 1
            if self._several >= MISSES:
                self._give_up("several passes belong to a step, or their gradients are changed")
        self._rerun.all(held)
        return None

    def _outcome(
        self, one: Pass, plan: PhasedPlan, grads: Sequence[Tensor | None]
    ) -> Report | None:
        """The step from the record; None where it would decide otherwise."""
        one.check_inputs()
        self._rerun.check_weights(one)
        self._rates.update()
        first = len(one.tensors)
        found = one.found | plan.given(0, one.tensors) | plan.given(first, one.G[0])
        found |= plan.given(first + len(one.G[0]), grads)
        with drawing(one.generator):
            outcome = plan.step(found, self._rates.tensors)
        # Where nothing has come of it, the weights have been put back.
        one.found, one.weights = {}, self._rerun.weights()
        if outcome is None:
            key = next(key for key, known in self._plans.items() if known is plan)
            self._count_miss(key, plan)
            return None
        plan.misses, plan.runs = 0, plan.runs + 1
        self.replayed += 1
        made: Report = self._kept(plan, outcome)
        return made

    # Records -----------------------------------------------------------------------------------

    def take(self, trajectories: list[Trajectory]) -> Report:
        """A step on passes that were run as they are written.

        Raises:
            Exception: As the step does.
        """
        waiting, self._waiting = self._waiting, None
        engine = self.optimizer.engine
        if engine.recorder is None and not self.reason:
            self._give_up("no pass is seen where feedback is off")
        usual = len(trajectories) == 1 and trajectories[0].error is None and not self.reason
        if waiting is None or not usual or len(waiting[1].G) != 1 or waiting[1].odd:
            self.written += 1
            made: Report = take(engine, trajectories)
        else:
            key, one = waiting
            self._unused = 0
            one.check_inputs()
            plan = self._plans.get(key)
            work = self._work(one)
            self._rates.update()
            one.put_back()
            asked = self._record(key, work) if plan is None else self._verify(plan, work)
            made = asked["report"]
        self.say(stacklevel=6)
        return made

    def reweigh(self, trajectories: list[Trajectory]) -> Reweighing:
        """What open loop adds to p.grad."""
        return reweighing(self.optimizer.engine, trajectories)

    def _asked(self, one: Pass) -> Work:
        """What a pass is told by, for `_usual`."""
        n = len(one.tensors)
        return Work(one.kind, one.tensors, lambda: None, lambda: ([], lambda: None), arguments=n)

    def _work(self, one: Pass) -> Work:
        """An iteration with this pass, its gradients given."""
        grads = [p.grad for p in self.optimizer.engine.parameters()]
        assert one.randomness is not None

        def traced() -> tuple[Sequence[Tensor | None], Any]:
            copy = one.copied()
            return [*copy.tensors, *one.G[0], *grads], partial(self._rerun.iteration, copy)

        inputs = [*one.tensors, *one.G[0], *grads]
        generator = one.randomness.torch_cpu
        written = partial(self._rerun.iteration, one)
        return Work(one.kind, inputs, written, traced, generator, len(one.tensors))

    def _planned(self, recording: Recording) -> Plan:
        return PhasedPlan(recording, self.compiles)

    def _report(self, made: Any) -> tuple[Any, StepReport | None]:
        return {"outputs": made["outputs"], "grads": made["grads"]}, made["report"]

    def _seen(self, asked: Any) -> Any:
        grads = [g.flatten() for g in asked["grads"].values()]
        return asked["outputs"], torch.cat(grads) if grads else None  # one alone may be rounding

    def _object(self, tracer: Tracer, made: Any, inputs: Sequence[Tensor | None]) -> None:
        others = calls.parameters_of_others(self.optimizer, self._modules)
        calls.look_again(tracer, made["outputs"], others)
        if self._rerun.unlike:
            tracer.refuse("p.grad is changed before the step")
        if any(p.grad is not None and p not in made["grads"] for p in self._net.parameters()):
            tracer.refuse("parameters have gradients that the pass has not made")
        for module in self._modules:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            backward = module._backward_hooks or module._backward_pre_hooks
            if backward or not all(isinstance(hook, Hook) for hook in hooks):
                tracer.refuse(f"a {type(module).__name__} has hooks")

    def _obstacle(self, work: Work) -> str:
        if any(t is not None and t.requires_grad for t in work.inputs[: work.arguments]):
            return "an argument requires gradients"
        return super()._obstacle(work)

    def _keep(self, plan: Plan, outcome: Outcome) -> Any:
        plan.commit(outcome)
        engine = self.optimizer.engine
        engine.rescale = 1.0
        engine.finish()
        return self._told(outcome)


def _identity(p: Tensor) -> Identity:
    return None if p.grad is None else (id(p.grad), p.grad._version)


def _ended(ref: weakref.ref[CapturedLoop]) -> None:
    loop = ref()
    if loop is not None:
        loop.end()
