# SPDX-License-Identifier: MIT
"""A training iteration that is recorded once and then run without its Python code."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddpnopt import decisions
from ddpnopt.captured import calls
from ddpnopt.captured.comparing import compare
from ddpnopt.captured.numbers import Rates, State
from ddpnopt.captured.plan import Outcome, Plan, Recording
from ddpnopt.captured.tracing import Reads, Tracer
from ddpnopt.curvature import Curvature
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.hyperparameters import curvatures
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist

#: Iterations run as written before one is recorded: the first ones check the layers' maps.
WARM = 4
#: Kinds of batches that have programs, the oldest gives way; and kinds of steps of each.
PLANS = 8
#: Recordings that turn out to look into the model's structure, or can't be run again, before it is
#: given up: now and then a step does more than usual.
POSTPONED, REFUSED = 50, 3
#: Runs in a row with other decisions before the iteration is recorded anew.
MISSES = 3
#: Recordings in a row that were run fewer times than this before it is given up.
FRUITLESS, FRUITFUL = 3, 20


class CapturedStep:
    """A whole training iteration of one optimizer: call it with a batch.

    Attributes:
        optimizer: The optimizer.
        replayed: Iterations that were run from the record.
        written: Iterations that were run as they are written.
        missed: Those of them whose decisions were not those of the record.
        compiles: Records are compiled; no longer so once torch's compiler has failed.
        reason: Why no iteration is run from a record any more; empty while they are.

    Args:
        optimizer: A `DDPNOpt`, or what else has its engine.
        loss: The batch to its loss, or to a tuple or dict whose first tensor is the loss.
        compile: Compile the program by torch's compiler.
    """

    def __init__(
        self, optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False
    ) -> None:
        if not isinstance(optimizer, Shell):
            raise TypeError(
                f"capture: expected a DDPNOpt or a Feedback, got {type(optimizer).__name__}; "
                "torch's own optimizers have torch.compile and CUDA graphs of their own"
            )
        self.optimizer, self.loss, self.compiles = optimizer, loss, compile
        self.replayed = self.written = self.missed = 0
        self.reason = ""
        self._said: list[str] = []
        #: Calls as written by kind of batch, and records by kinds of batch and step.
        self._warm: dict[Any, int] = {}
        self._plans: dict[tuple[Any, Any], Plan] = {}
        #: The parameters' curvatures, where any does not do the same in every step.
        self._curvatures: dict[Tensor, Curvature] = {}
        self._fruitless = self._postponed = self._refused = 0
        self._rates = Rates(optimizer)
        self._settings: list[Any] = []
        self._model: nn.Module | None = None
        self._modules: list[nn.Module] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run an iteration: gradients cleared, forward pass, backward pass, step.

        Returns:
            What the loss function returns, without graphs.

        Raises:
            Exception: As the iteration does.
        """
        made = self._as_written(args, kwargs) if self.reason else self._run(args, kwargs)
        while self._said:
            warnings.warn(f"capture: {self._said.pop(0)}", DDPNOptWarning, stacklevel=2)
        return made

    def _run(self, args: Any, kwargs: Any) -> Any:
        """From a record, if there is one that fits."""
        leaves, tree = tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, torch.Tensor)]
        key = (tree, calls.autocast_of(inputs), tuple(map(calls.kind_of, leaves)))
        if not self._hashable(key):
            return self._as_written(args, kwargs)
        self._watch_settings()
        kind = calls.kind_of_step(self.optimizer, self._curvatures) if self._curvatures else ()
        plan = self._plans.get((key, kind))
        if plan is None:
            cold = self._warm.get(key, 0) < WARM or self._crowded(key)
            if kind is None or cold or not self._usual(inputs):
                self._warm_up(key)
                return self._as_written(args, kwargs)
            return self._record((key, kind), args, kwargs)
        if not self._usual(inputs) or not plan.current():
            self._forget(key)
            return self._as_written(args, kwargs)
        self._rates.update()
        if not plan.verified:
            if 0 in self._rates.numbers:  # a step that moves nothing shows nothing
                return self._as_written(args, kwargs)
            return self._verify(plan, inputs, args, kwargs)
        outcome = plan(inputs, self._rates.tensors)
        if outcome is None:
            return self._missed((key, kind), plan, args, kwargs)
        plan.misses, plan.runs = 0, plan.runs + 1
        insist(lambda: self._commit(plan, outcome))
        self.replayed += 1
        return outcome.made

    def _warm_up(self, key: Any) -> None:
        """Count an iteration of a kind of batch; the oldest kind gives way to a new one."""
        if key not in self._warm and len(self._warm) >= PLANS:
            self._forget(next(iter(self._warm)))
        self._warm[key] = self._warm.get(key, 0) + 1

    def _crowded(self, key: Any) -> bool:
        """Whether as many kinds of steps as may be have a record."""
        return bool(sum(known == key for known, _ in self._plans) >= PLANS)

    def _forget(self, key: Any) -> None:
        """A kind of batch is as good as new."""
        self._warm.pop(key, None)
        self._plans = {known: plan for known, plan in self._plans.items() if known[0] != key}

    def _as_written(self, args: Any, kwargs: Any) -> Any:
        self.optimizer.zero_grad()
        made = self._iteration(args, kwargs)
        self.written += 1
        return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, made)

    def _iteration(self, args: Any, kwargs: Any) -> Any:
        with torch.enable_grad():
            made = self.loss(*args, **kwargs)
            loss = next((t for t in tree_leaves(made) if isinstance(t, torch.Tensor)), None)
            if loss is None:
                raise TypeError(
                    "capture: the loss function returned no tensor; it must return the loss, or a "
                    "tuple or dict whose first tensor is the loss"
                )
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return made

    def _record(self, key: tuple[Any, Any], args: Any, kwargs: Any) -> Any:
        """Run an iteration as it is written, and take it down."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        self._rates.update()
        # Of copies: the loss function may know these tensors by another way, too.
        args, kwargs = tree_map(calls.copied, (args, kwargs))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        others = calls.parameters_of_others(self.optimizer, self._modules)
        state, tracer = State(optimizer), Tracer()
        plan: Plan | None = None
        try:
            with self._rates.in_groups():
                for t in (*inputs, *self._rates.tensors, *(old for _, old in state.tensors)):
                    tracer.value(t)
                with decisions.tracing(tracer), Reads(tracer), tracer:
                    made = self._iteration(args, kwargs)
                    sound = tracer.conclude()
            self.written += 1
            for name in state.computed():
                tracer.refuse(f"the optimizer keeps a number ('{name}')")
            if not tracer.refusal:
                calls.look_again(tracer, made, others)
            if not (tracer.refusal or tracer.postponed):
                recording = Recording(
                    tracer,
                    sound,
                    inputs,
                    self._rates.tensors,
                    state.tensors,
                    state.counts,
                    made,
                    optimizer.last_step,
                    optimizer.engine.copies,
                    self._modules,
                )
                candidate = Plan(recording, self.compiles)
                if candidate.program.writes_arguments:
                    tracer.refuse("an argument is changed in place")
                else:
                    plan = self._plans[key] = candidate
                    self._refused = 0
        finally:
            if plan is None:
                state.as_numbers()
        optimizer.zero_grad()
        self._judge(tracer)
        # Copies: what was made from numbers alone is the record's own.
        return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, made)

    def _judge(self, tracer: Tracer) -> None:
        """Give recording up if it keeps failing."""
        if tracer.postponed:
            self._postponed += 1
        elif tracer.refusal:
            self._refused += 1
        if self._postponed >= POSTPONED or self._refused >= REFUSED:
            unsettled = "the model's structure is still being found out"
            self._give_up(
                unsettled if tracer.postponed else tracer.refusal + calls.hint(self.optimizer)
            )

    def _watch_settings(self) -> None:
        """Other settings than those of the recordings make them void."""
        model = self.optimizer.model
        if model is not self._model:
            self._model, self._modules = model, list(model.modules())
        settings = calls.settings_of(self.optimizer, self._modules)
        if settings != self._settings:
            self._plans, self._warm, self._settings = {}, {}, settings
            known = curvatures(self.optimizer.param_groups)
            self._curvatures = known if any(one.counts for one in known.values()) else {}

    def _hashable(self, key: Any) -> bool:
        """Whether batches of this kind can be told from others."""
        try:
            hash(key)
        except TypeError as error:
            self._give_up(f"an argument can't be told from others ({calls.first_line(error)})")
        return not self.reason

    def _usual(self, inputs: Sequence[Tensor]) -> bool:
        """Whether nothing is in the way of running from the record at this call."""
        if self.optimizer.engine.company.ranks.several:
            self._give_up("several ranks train together")
        elif calls.has_hooks(self.optimizer):
            self._give_up("an optimizer has step hooks")
        elif any(t.requires_grad for t in inputs):
            self._give_up("an argument requires gradients")
        elif self._curvatures and self.optimizer.engine.parameters()[0].device.type != "cpu":
            self._give_up("KFAC and EKFAC are recorded on CPUs alone")
        elif decisions.traced():  # in another thread
            return False
        return not self.reason and all(0 <= rate < math.inf for rate in self._rates.numbers)

    def _give_up(self, why: str) -> None:
        """From now on iterations run as they are written."""
        self.reason = why
        self._plans = {}
        self._said.append(f"{why}; iterations run as they are written")

    def _missed(self, key: tuple[Any, Any], plan: Plan, args: Any, kwargs: Any) -> Any:
        self.missed += 1
        plan.misses += 1
        if plan.misses >= MISSES:
            del self._plans[key]
            self._fruitless = self._fruitless + 1 if plan.runs < FRUITFUL else 0
            if self._fruitless >= FRUITLESS:
                self._give_up("what the step decides (about the loss, say) changes all the time")
        return self._as_written(args, kwargs)

    def _commit(self, plan: Plan, outcome: Outcome) -> None:
        plan.commit(outcome)
        self.optimizer.report_later(outcome.report)

    def _verify(self, plan: Plan, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Compare the record with the code; from then on it is run."""
        made, off = compare(
            plan,
            lambda: self._first_run(plan, inputs),
            lambda: self._as_written(args, kwargs),
        )
        self.optimizer.zero_grad()
        if off is None:
            return made
        if off:
            self._give_up(
                f"a recorded iteration differs from the code by {off:.2%}: perhaps something else "
                "than the batch and the weights changes from call to call"
            )
            return made
        plan.verified = True
        if any(t.device.type == "cuda" for t in plan.changed):
            try:
                plan.capture_graph(inputs, self._rates.tensors)
            except RuntimeError as error:
                self._give_up(f"a CUDA graph can't hold the iteration ({calls.first_line(error)})")
        return made

    def _first_run(self, plan: Plan, inputs: list[Tensor]) -> Outcome | None:
        """A run that may have to be compiled; what the compiler can't do is run as it is."""
        if not plan.compiled:
            return plan(inputs, self._rates.tensors)
        try:
            return plan(inputs, self._rates.tensors)
        except Exception as error:  # whatever a compiler may raise; shown, and done without it
            self._said.append(
                f"torch's compiler failed ({calls.first_line(error)}); the recorded operators are "
                "run one by one"
            )
            self.compiles = False
            plan.interpret()
            return plan(inputs, self._rates.tensors)


def capture(optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False) -> CapturedStep:
    """A whole training iteration as one function of the batch, run without its Python code.

    The first iterations run as they are written. One is recorded: every operator of the forward
    pass, the backward pass and the step. The next one is run both ways and compared. From then on
    the operators are run by themselves: on a GPU as one CUDA graph, on the CPU one after another,
    or compiled by torch's compiler into few kernels.

    What the step decides by numbers on the way (is the loss still the one that was recognised, are
    all numbers finite, has the scalar equation converged) is decided as in the recording and
    checked at the end of each run; where it would be decided otherwise, everything is put back and
    the iteration runs as it is written.

    Args:
        optimizer: A `DDPNOpt` or a `Feedback`.
        loss: The batch's tensors to its loss, or to a tuple or dict whose first tensor is the loss.
            As under a CUDA graph its Python code runs in the recording alone.
        compile: Compile the program; takes from ten seconds to a minute and a half, and a C++
            compiler on the CPU.

    Returns:
        A function of a batch that takes a training step, and returns what ``loss`` returns.
        Gradients are not kept.

    Raises:
        TypeError: The optimizer is none of this package.

    Examples:
        >>> step = capture(opt, lambda x, y: criterion(model(x), y))
        >>> for x, y in loader:
        ...     loss = step(x, y)
    """
    return CapturedStep(optimizer, loss, compile=compile)
