# SPDX-License-Identifier: MIT
"""Records of a piece of training: when one is made, compared, run, and given up."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from ddpnopt import decisions
from ddpnopt.captured import calls
from ddpnopt.captured.calls import Work
from ddpnopt.captured.comparing import compare
from ddpnopt.captured.numbers import Rates, State
from ddpnopt.captured.plan import Plan
from ddpnopt.captured.recording import Outcome, Recording
from ddpnopt.captured.tracing import Reads, Tracer
from ddpnopt.curvature import Curvature
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.hyperparameters import curvatures
from ddpnopt.randomness import drawing
from ddpnopt.report import StepReport
from ddpnopt.shell import Shell
from ddpnopt.structure import Anatomy
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist

#: Calls run as written before one is recorded: the first ones check the layers' maps.
WARM = 4
#: Kinds of batches that have records, the oldest gives way; and kinds of steps of each.
PLANS = 8
#: Recordings that turn out to look into the model's structure, or can't be run again, before it is
#: given up: now and then a step does more than usual.
POSTPONED, REFUSED = 50, 3
#: Runs in a row with other decisions before a new recording.
MISSES = 3
#: Recordings in a row that were run fewer times than this before it is given up.
FRUITLESS, FRUITFUL = 3, 20


class Records(ABC):
    """Records of one optimizer's work, by kinds of batch and step.

    Attributes:
        optimizer: The optimizer.
        replayed: Calls that were run from the record.
        written: Calls that were run as they are written.
        missed: Those of them whose decisions were not those of the record.
        compiles: Records are compiled; no longer so once torch's compiler has failed.
        reason: Why nothing is run from a record any more; empty while it is.

    Args:
        optimizer: A `DDPNOpt`, or what else has its engine.
        compile: Compile the records by torch's compiler.

    Raises:
        TypeError: The optimizer is none of this package.
    """

    #: What a call does; runs from a new record until it is compared again; what else to try.
    what, compare_every, advice = "", math.inf, ""

    def __init__(self, optimizer: Shell, *, compile: bool = False) -> None:
        calls.check_optimizer(optimizer)
        self.optimizer, self.compiles = optimizer, compile
        self.replayed = self.written = self.missed = 0
        self.reason, self._said = "", list[str]()
        #: Calls as written by kind of batch, and records by kinds of batch and step.
        self._warm: dict[Any, int] = {}
        self._plans: dict[tuple[Any, Any], Plan] = {}
        #: The parameters' curvatures, where any does not do the same in every step.
        self._curvatures: dict[Tensor, Curvature] = {}
        self._fruitless = self._postponed = self._refused = self._unconfirmed = 0
        self._rates = Rates(optimizer)
        self._settings, self._modules = list[Any](), list[nn.Module]()
        self._model: nn.Module | None = None
        self._anatomy: Anatomy | None = None

    # What the work is ------------------------------------------------------------------------

    @abstractmethod
    def _report(self, made: Any) -> tuple[Any, StepReport | None]:
        """Of what the work has made: what is to be made again, and the record of the step."""

    def _seen(self, asked: Any) -> Any:
        """What of that is compared, by what it is."""
        return asked

    @abstractmethod
    def _object(self, tracer: Tracer, made: Any, inputs: Sequence[Tensor | None]) -> None:
        """Refuse what only shows when the work is done."""

    @abstractmethod
    def _keep(self, plan: Plan, outcome: Outcome) -> Any:
        """A run from the record counts; may be begun again."""

    def _hashable(self, kind: Any) -> bool:
        """Whether this kind can be told from others."""
        try:
            hash(kind)
        except TypeError as error:
            self._give_up(f"an argument can't be told from others ({calls.first_line(error)})")
        return not self.reason

    def _obstacle(self, inputs: Sequence[Tensor | None]) -> str:
        """What is in the way of all records; or ''."""
        if self.optimizer.engine.company.ranks.several:
            return "several ranks train together"
        if self._curvatures and self.optimizer.engine.parameters()[0].device.type != "cpu":
            return "KFAC and EKFAC are recorded on CPUs alone"
        return ""

    # One call --------------------------------------------------------------------------------

    def _run(self, work: Work) -> Any:
        """From a record, if there is one that fits."""
        self._watch_settings()
        kind = calls.kind_of_step(self.optimizer, self._curvatures) if self._curvatures else ()
        plan = self._plans.get((work.kind, kind))
        if plan is None:
            cold = self._warm.get(work.kind, 0) < WARM or self._crowded(work.kind)
            still = 0 in self._rates.numbers  # where nothing moves, ratios are 0 / 0
            if kind is None or cold or still or not self._usual(work.inputs):
                self._warm_up(work.kind)
                return self._as_written(work)
            return self._record((work.kind, kind), work)
        if not self._usual(work.inputs) or not plan.current():
            self._forget(work.kind)
            return self._as_written(work)
        self._rates.update()
        if not plan.verified or plan.runs >= plan.due:
            if 0 in self._rates.numbers:  # a step that moves nothing shows nothing
                return self._as_written(work)
            return self._verify(plan, work)
        outcome = self._from(plan, work)
        if outcome is None:
            self._count_miss(plan)
            return self._as_written(work)
        plan.misses, plan.runs = 0, plan.runs + 1
        made = self._kept(plan, outcome)
        self.replayed += 1
        return made

    def _from(self, plan: Plan, work: Work) -> Outcome | None:
        """Run a record."""
        with drawing(work.generator if plan.random else None):
            return plan(work.inputs, self._rates.tensors)

    def _kept(self, plan: Plan, outcome: Outcome) -> Any:
        made: list[Any] = []
        insist(lambda: made.append(self._keep(plan, outcome)))
        return made[-1]

    def _as_written(self, work: Work) -> Any:
        made = work.written()
        self.written += 1
        return made

    def _warm_up(self, kind: Any) -> None:
        """Count a call of a kind; the oldest kind gives way to a new one."""
        if kind not in self._warm and len(self._warm) >= PLANS:
            self._forget(next(iter(self._warm)))
        self._warm[kind] = self._warm.get(kind, 0) + 1

    def _crowded(self, kind: Any) -> bool:
        """Whether as many kinds of steps as may be have a record."""
        return bool(sum(known == kind for known, _ in self._plans) >= PLANS)

    def _forget(self, kind: Any) -> None:
        """A kind of batch is as good as new."""
        self._warm.pop(kind, None)
        self._plans = {known: plan for known, plan in self._plans.items() if known[0] != kind}

    def _current(self, key: tuple[Any, Any]) -> Plan | None:
        """The record, unless a tensor of it is another by now."""
        plan = self._plans.get(key)
        if plan is not None and not plan.current():
            self._forget(key[0])
            return None
        return plan

    def _drop(self, plan: Plan) -> None:
        """Another is made in its place."""
        self._plans = {key: known for key, known in self._plans.items() if known is not plan}

    def _put_off(self, plan: Plan) -> None:
        """A record can't be confirmed: another is made after twice as many calls as the last."""
        self._unconfirmed += 1
        kinds = [kind for (kind, _), known in self._plans.items() if known is plan]
        self._drop(plan)
        self._warm.update(dict.fromkeys(kinds, WARM - 2**self._unconfirmed))

    def _count_miss(self, plan: Plan) -> None:
        """A record's decisions were others."""
        self.missed += 1
        plan.misses += 1
        if plan.misses >= MISSES:
            self._drop(plan)
            self._fruitless = self._fruitless + 1 if plan.runs < FRUITFUL else 0
            if self._fruitless >= FRUITLESS:
                self._give_up("what the step decides (about the loss, say) changes all the time")

    # A new record ----------------------------------------------------------------------------

    def _record(self, key: tuple[Any, Any], work: Work) -> Any:
        """Do the work as it is written, and take it down."""
        optimizer = self.optimizer
        self._rates.update()
        inputs, run = work.traced()
        state, tracer = State(optimizer), Tracer(draws=work.generator is not None)
        there = [t for t in inputs if t is not None]
        plan: Plan | None = None
        try:
            with self._rates.in_groups():
                tracer.give([*there, *self._rates.tensors, *(old for _, old in state.tensors)])
                with decisions.tracing(tracer), Reads(tracer), tracer:
                    made = run()
                    sound = tracer.conclude()
            self.written += 1
            if state.grown():
                tracer.postpone(decisions.UNSETTLED)
            for name in state.computed():
                tracer.refuse(f"the optimizer keeps a number ('{name}')")
            if not tracer.refusal:
                self._object(tracer, made, inputs)
            if not (tracer.refusal or tracer.postponed):
                recording = Recording(
                    tracer,
                    sound,
                    inputs,
                    self._rates.tensors,
                    state.tensors,
                    state.counts,
                    *self._report(made),
                    optimizer.engine.copies,
                    self._modules,
                )
                candidate = self._planned(recording)
                if candidate.refusal:
                    tracer.refuse(candidate.refusal)
                else:
                    plan = self._plans[key] = candidate
                    self._refused = 0
        finally:
            if plan is None:
                state.as_numbers()
        self._judge(tracer)
        return made

    def _planned(self, recording: Recording) -> Plan:
        return Plan(recording, self.compiles)

    def _judge(self, tracer: Tracer) -> None:
        """Give recording up if it keeps failing."""
        if tracer.postponed:
            self._postponed += 1
        elif tracer.refusal:
            self._refused += 1
        if self._postponed >= POSTPONED or self._refused >= REFUSED:
            self._give_up(tracer.postponed or tracer.refusal + calls.hint(self.optimizer))

    def _verify(self, plan: Plan, work: Work) -> Any:
        """Compare the record with the code; from then on it is run."""
        made, off = compare(
            plan,
            lambda of: self._first_run(plan, work.of(of)),
            lambda: self._as_written(work),
            lambda made: self._report(made)[0],
            self._seen,
        )
        if off is None:  # what was decided in the recording is not decided so again
            plan.misses += 1
            if plan.misses >= MISSES:
                self._put_off(plan)
            return made
        if off and plan.compiled:
            self._do_without_compiler(plan, f"a compiled {self.what} differs by {off:.2%}")
            return made
        if off:
            self._differs(off)
            return made
        plan.confirm(self.compare_every)
        self._unconfirmed = 0
        if any(t.device.type == "cuda" for t in plan.changed):
            try:
                plan.capture_graph(work.inputs, self._rates.tensors)
            except RuntimeError as error:
                line = calls.first_line(error)
                self._give_up(f"a CUDA graph can't hold the {self.what} ({line})")
        return made

    def _differs(self, off: float) -> None:
        self._give_up(
            f"a recorded {self.what} differs from the code by {off:.2%}: perhaps something else "
            "than the batch and the weights changes from call to call"
        )

    def _first_run(self, plan: Plan, work: Work) -> Outcome | None:
        """A run that may have to be compiled; what the compiler can't do is run as it is."""
        if not plan.compiled:
            return self._from(plan, work)
        try:
            return self._from(plan, work)
        except Exception as error:  # whatever a compiler may raise; shown, and done without it
            self._do_without_compiler(plan, f"torch's compiler failed ({calls.first_line(error)})")
            return self._from(plan, work)

    def _do_without_compiler(self, plan: Plan, why: str) -> None:
        """The recorded operators are run as they are from now on."""
        self._said.append(f"{why}; the recorded operators are run one by one")
        self.compiles = False
        plan.interpret()

    # What may make records void ----------------------------------------------------------------

    def _watch_settings(self) -> None:
        """Other settings than those of the recordings make them void."""
        model, recorder = self.optimizer.model, self.optimizer.engine.recorder
        anatomy = None if recorder is None else recorder.anatomy
        if model is not self._model or anatomy is not self._anatomy:  # a layer may be another
            self._model, self._modules, self._settings = model, list(model.modules()), []
            self._anatomy = anatomy
        settings = calls.settings_of(self.optimizer, self._modules)
        if settings != self._settings:
            self._plans, self._warm, self._settings = {}, {}, settings
            known = curvatures(self.optimizer.param_groups)
            self._curvatures = known if any(one.counts for one in known.values()) else {}

    def _usual(self, inputs: Sequence[Tensor | None]) -> bool:
        """Whether nothing is in the way of running from the record at this call."""
        if obstacle := self._obstacle(inputs):
            self._give_up(obstacle)
        elif decisions.traced():  # in another thread
            return False
        return not self.reason and all(0 <= rate < math.inf for rate in self._rates.numbers)

    def _give_up(self, why: str) -> None:
        """From now on everything runs as it is written."""
        self.reason = why
        self._plans = {}
        self._said.append(f"{why}; {self.what}s run as they are written{self.advice}")

    def say(self, stacklevel: int) -> None:
        """Say what there is to say to whoever has called."""
        while self._said:
            warnings.warn(f"capture: {self._said.pop(0)}", DDPNOptWarning, stacklevel + 1)
