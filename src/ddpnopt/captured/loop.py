# SPDX-License-Identifier: MIT
"""A plain loop whose forward pass, backward pass and step are run from a record."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from operator import is_not
from typing import Any

import torch
from torch import nn

from ddpnopt.captured import calls
from ddpnopt.captured.ahead import Ahead
from ddpnopt.captured.forward import Forward, Pass, attach, watched
from ddpnopt.captured.holding import Held
from ddpnopt.captured.phased import PhasedPlan
from ddpnopt.captured.plan import Plan
from ddpnopt.captured.recording import Outcome, Recording, told
from ddpnopt.captured.records import MISSES, POSTPONED, WARM, Records
from ddpnopt.captured.rerunning import Rerun, off_by, restoring
from ddpnopt.captured.tracing import Tracer
from ddpnopt.randomness import drawing
from ddpnopt.report import Report, StepReport
from ddpnopt.reweighting import Reweighing, reweighing
from ddpnopt.shell import Shell
from ddpnopt.shortcuts import Shortcut
from ddpnopt.stages import Trajectory
from ddpnopt.taking import take
from ddpnopt.typing import Tensor


class CapturedLoop(Records, Shortcut):
    """The iterations of a plain loop, run from a record for as long as this is not removed.

    The model's forward pass, ``backward`` and ``opt.step()`` are recorded together and run in
    parts, between which the loop has its turn, with the loss first of all.

    Attributes:
        optimizer: The optimizer.
        replayed: Steps that were run from the record.
        written: Steps that were run as they are written.
        missed: Those of them that decided otherwise, or that the backward pass could not know.
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
    advice = " (capture(opt) without passes=True records the step alone, and may still do so)"

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
        self._held = Held()
        self._rerun = Rerun(weakref.proxy(optimizer), self._net)
        self._unused = self._several = self._passes = 0
        #: The last pass from the record, while anything may come of it.
        self._last: weakref.ref[Pass] | None = None
        self._ahead = Ahead(self._rates, self._rerun.weights, optimizer.options.closed_loop)
        self._forward = Forward(self, self._net)
        self._net.forward = self._forward
        weakref.finalize(self, self._forward.remove)
        engine.shortcut = self

    def remove(self) -> None:
        """From now on everything runs as it is written, passes included that have just run."""
        self._forward.remove()
        try:
            engine = self.optimizer.engine
        except ReferenceError:  # the optimizer is gone
            return
        if engine.shortcut is self:
            held = self._held.taken()
            if held and engine.recorder is not None:
                self._rerun.all(held)
            engine.shortcut = None

    def give_up(self, why: str) -> None:
        """From now on everything runs as it is written."""
        if not self.reason:
            self._give_up(why)

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
        if self._several_begin():
            return False
        one.number, self._passes = self._passes, self._passes + 1
        one.training = [(m, m.training) for m in self._modules]
        self._watch_settings()
        step = calls.kind_of_step(self.optimizer, self._curvatures) if self._curvatures else ()
        key = one.kind, step
        plan = self._current(key)
        usual = step is not None and self._usual(one.tensors) and engine.rescale == 1.0
        if usual and isinstance(plan, PhasedPlan) and plan.verified and plan.runs < plan.due:
            self._due = one, plan
            return True
        self._waiting = None
        if plan is None and (self._warm.get(one.kind, 0) < WARM or self._crowded(one.kind)):
            self._warm_up(one.kind)
        elif usual and 0 not in self._rates.numbers:
            one.prepare(self._modules)
            self._waiting, one.weights = (key, one), self._rerun.weights()
            self._unused += 1
            if self._unused > POSTPONED:
                self._give_up("p.grad is rescaled, p.data replaced, or a step has several passes")
        return False

    def leaves(self, module: nn.Module, output: Any, replaced: Any) -> Any:
        """Ask for the gradients at what a pass returns that is to be recorded."""
        waiting = module is self._net and output is not None and not self._rerun.runs
        if self._waiting is None or not waiting or self._waiting[1].G:
            return replaced
        return watched(self._waiting[1], output)

    def _several_begin(self) -> bool:
        """Whether another pass goes before this one in the same step: all run as they are written.

        In open loop what a pass adds to p.grad depends on what is there already.
        """
        last = self._last() if self._last is not None else None
        if last is not None and not last.G:  # both may belong to one loss
            last.odd = True
            self._count_several()
            return True
        self._held.drop_stale()
        held = self._held.taken()
        if not held:
            return False
        self._count_several()
        with torch._C._EnableTorchFunction():  # off within hooks
            self._rerun.all(held)
        return True

    def _count_several(self) -> None:
        self._several += 1
        if self._several >= MISSES:
            self._give_up("several passes belong to a step, or p.grad is changed before it")

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward pass."""
        due, self._due = self._due, None
        if due is None or len(args) != len(due[0].args) or any(map(is_not, args, due[0].args)):
            return self._forward.method(*args, **kwargs)
        one, plan = due
        one.plan, self._last = plan, weakref.ref(one)
        one.weights = self._rerun.weights()
        one.generator = torch.get_rng_state() if plan.random else None
        one.buffers = [(b, b.detach().clone()) for b in plan.buffers]
        self._rates.update()
        outputs, saved = plan.forward(plan.given(0, one.tensors), self._rates.tensors)
        return plan.output(attach(self, one, outputs, saved, self._token))

    # Backward pass -----------------------------------------------------------------------------

    def backward(
        self, one: Pass, saved: Sequence[Tensor], G: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """The parameters' gradients; or None, where they have got into p.grad already.

        Raises:
            UnsupportedModelError: An argument was overwritten.
        """
        plan, first = one.plan, len(one.tensors)
        assert plan is not None
        one.check_inputs()
        given = [None if g is None else g.detach() for g in G]
        found: Sequence[Tensor] = []
        sound = [g is not None for g in given] == plan.there[first : first + len(G)]
        sound = sound and plan.still_current()
        engine = self.optimizer.engine
        if sound and engine.shortcut is self:
            inputs = plan.given(0, one.tensors) | plan.given(first, given)
            found, decided = self._ahead.backward(one, plan, saved, inputs)
            # What open loop adds to p.grad can't be taken back at the step.
            sound = decided or bool(found and not engine.in_backward)
        if not sound or engine.shortcut is not self:
            self._rerun.instead(replace(one, G=[given]))
            one.G.append(given)
            return [None] * len(plan.receiving)
        one.G.append(given)
        self._held.add(one, plan.receiving)
        return found

    def forget(self) -> None:
        """Gradients have been used or cleared."""
        self._held.drop()

    # Step --------------------------------------------------------------------------------------

    def step(self, closure: Any) -> Report | None:
        """A step on passes that were run from the record."""
        held, engine = self._held.taken(), self.optimizer.engine
        if not held or engine.recorder is None:
            return None
        try:
            return self._step(held, closure)
        except BaseException:
            self._held.passes = held  # the step may be tried again
            raise

    def _step(self, held: list[Pass], closure: Any) -> Report | None:
        engine, one = self.optimizer.engine, held[0]
        assert one.plan is not None and engine.recorder is not None
        others, grads = engine.recorder.arrivals.completed, [p.grad for p in engine.parameters()]
        there = [g is not None and g.layout == torch.strided for g in grads]
        like = there == one.plan.there[-len(grads) :] and not (one.odd or others or closure)
        like = like and calls.settings_of(self.optimizer, self._modules) == self._settings
        if len(held) == len(one.G) == 1 and like:
            self._several = 0
            if self._ahead.stands(one, one.plan):
                outcome = self._outcome(one, one.plan, grads)
                if outcome is not None:
                    return outcome
            else:
                self.missed += 1
                if not self._ahead.joins:  # the next record has the step apart
                    self._drop(one.plan)
        else:
            self._count_several()
        self._rerun.all(held)
        self.say(stacklevel=6)
        return None

    def _outcome(
        self, one: Pass, plan: PhasedPlan, grads: Sequence[Tensor | None]
    ) -> Report | None:
        """The step from the record; None where it would decide otherwise."""
        one.check_inputs()
        early, one.early = one.early, None
        if early is None or early.weights != one.weights:
            self._rerun.check_weights(one)
        if early is not None:
            outcome = plan.taken(early)
        else:
            self._rates.update()
            inputs = [*one.tensors, *one.G[0], *grads]
            with drawing(one.generator):
                outcome = plan.step(one.found, inputs, self._rates.tensors)
            # Where nothing has come of it, the weights have been put back.
            one.found, one.weights = {}, self._rerun.weights()
        if outcome is None:
            self._count_miss(plan)
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
        if engine.recorder is None:
            self.give_up("no pass is seen where feedback is off")
        if any(p.grad is not None and p.grad.is_sparse for p in engine.parameters()):
            self.give_up("a gradient is sparse")
        usual = len(trajectories) == 1 and trajectories[0].error is None and not self.reason
        if waiting is None or not usual or not waiting[1].recordable():
            self.written += 1
            made: Report = take(engine, trajectories)
        else:
            (key, one), self._unused = waiting, 0
            one.check_inputs()
            self._rerun.check_weights(one)
            plan = self._current(key)
            work = self._rerun.work(one)
            self._rates.update()
            if isinstance(plan, PhasedPlan) and (off := off_by(one, plan, self._rates.tensors)):
                self._differs(off)
                self.written += 1
                self.say(stacklevel=7)
                return take(engine, trajectories)
            with restoring(one.buffers):  # other passes may have come since
                one.put_back()
                asked = self._record(key, work) if plan is None else self._verify(plan, work)
            made = asked["report"]
        self.say(stacklevel=7)
        return made

    def reweigh(self, trajectories: list[Trajectory]) -> Reweighing:
        """What open loop adds to p.grad."""
        return reweighing(self.optimizer.engine, trajectories)

    def _planned(self, recording: Recording) -> Plan:
        parameters = self.optimizer.engine.parameters()
        return PhasedPlan(recording, self.compiles, self._ahead.joins, parameters)

    def _report(self, made: Any) -> tuple[Any, StepReport | None]:
        return {name: made[name] for name in ("outputs", "grads", "sound")}, made["report"]

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
        if (hooked := calls.hooked(self._modules)) is not None:
            tracer.refuse(f"a {type(hooked).__name__} has hooks")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._net.parameters()):
            tracer.refuse("a parameter has hooks")

    def _obstacle(self, inputs: Sequence[Tensor | None]) -> str:
        if any(t is not None and t.requires_grad for t in inputs):
            return "an argument requires gradients"
        return super()._obstacle(inputs)

    def _keep(self, plan: Plan, outcome: Outcome) -> Any:
        plan.commit(outcome)
        engine = self.optimizer.engine
        engine.rescale = 1.0
        engine.finish()
        return told(outcome, self.optimizer.skipped)
