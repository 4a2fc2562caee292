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
from ddpnopt.captured.calls import autocast_of, copied, first_line, has_hooks, kind_of
from ddpnopt.captured.comparing import compare
from ddpnopt.captured.numbers import Rates, State
from ddpnopt.captured.plan import Outcome, Plan, Recording
from ddpnopt.captured.tracing import Reads, Tracer
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist

#: Iterations run as written before one is recorded: the first ones check the layers' maps.
WARM = 4
#: Kinds of batches that have a program at one time; the oldest gives way.
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
        reason: Why no iteration is run from a record any more; empty while they are.

    Args:
        optimizer: A `DDPNOpt`, or what else has its engine.
        loss: The batch to its loss, or to a tuple or dict whose first tensor is the loss.
        compile: Compile the program by `torch.compile`.
    """

    def __init__(
        self, optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False
    ) -> None:
        if not isinstance(optimizer, Shell):
            raise TypeError(
                f"capture: expected a DDPNOpt or a Feedback, got {type(optimizer).__name__}; "
                "torch's own optimizers have torch.compile and CUDA graphs of their own"
            )
        self.optimizer, self.loss, self._compiled = optimizer, loss, compile
        self.replayed = self.written = self.missed = 0
        self.reason = ""
        self._said: list[str] = []
        self._plans: dict[Any, Plan | int] = {}
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
        key = (tree, autocast_of(inputs), tuple(map(kind_of, leaves)))
        if not self._hashable(key):
            return self._as_written(args, kwargs)
        self._watch_settings()
        plan = self._plans.get(key, 0)
        if isinstance(plan, int):
            if plan < WARM or not self._usual(inputs):
                if key not in self._plans and len(self._plans) >= PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan + 1
                return self._as_written(args, kwargs)
            return self._record(key, args, kwargs)
        if not self._usual(inputs) or not plan.current():
            del self._plans[key]
            return self._as_written(args, kwargs)
        self._rates.update()
        if not plan.verified:
            return self._verify(plan, inputs, args, kwargs)
        outcome = plan(inputs, self._rates.tensors)
        if outcome is None:
            return self._missed(key, plan, args, kwargs)
        plan.misses, plan.runs = 0, plan.runs + 1
        insist(lambda: self._commit(plan, outcome))
        self.replayed += 1
        return outcome.made

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

    def _record(self, key: Any, args: Any, kwargs: Any) -> Any:
        """Run an iteration as it is written, and take it down."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        self._rates.update()
        # Of copies: the loss function may know these tensors by another way, too.
        args, kwargs = tree_map(copied, (args, kwargs))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        others = self._others()
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
                self._look_again(tracer, made, others)
            if not (tracer.refusal or tracer.postponed):
                recording = Recording(
                    tracer,
                    sound,
                    inputs,
                    self._rates.tensors,
                    state.tensors,
                    made,
                    optimizer.last_step,
                    optimizer.engine.copies,
                    self._modules,
                )
                candidate = Plan(recording, self._compiled)
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

    def _others(self) -> list[Tensor]:
        """Parameters of the model that some other optimizer trains, if any does."""
        own = {id(p) for p in self.optimizer.engine.parameters()}
        return [p for m in self._modules for p in m.parameters(False) if id(p) not in own]

    def _look_again(self, tracer: Tracer, made: Any, others: Sequence[Tensor]) -> None:
        """Refuse what only shows when the iteration is over."""
        plain = (torch.Tensor, int, float, str, type(None))
        odd = next((leaf for leaf in tree_leaves(made) if not isinstance(leaf, plain)), None)
        if odd is not None:
            tracer.refuse(f"the loss function returns a {type(odd).__name__}")
        if any(p.grad is not None for p in others):
            tracer.refuse("parameters that are not the optimizer's get gradients")
        if tracer.strangers():
            tracer.refuse("a tensor is made out of sight, as with several passes in closed loop")
        if tracer.constants_change():
            tracer.refuse("a tensor made from numbers alone is changed in place")

    def _judge(self, tracer: Tracer) -> None:
        """Give recording up if it keeps failing."""
        if tracer.postponed:
            self._postponed += 1
        elif tracer.refusal:
            self._refused += 1
        if self._postponed >= POSTPONED or self._refused >= REFUSED:
            unsettled = "the model's structure is still being found out"
            self._give_up(unsettled if tracer.postponed else tracer.refusal + self._hint())

    def _watch_settings(self) -> None:
        """Other settings than those of the recordings make them void."""
        model, engine = self.optimizer.model, self.optimizer.engine
        if model is not self._model:
            self._model, self._modules = model, list(model.modules())
        settings: list[Any] = [m.training for m in self._modules]
        settings += [engine.recorder is None, engine.waiting]
        for group in self.optimizer.param_groups:
            settings += [p.requires_grad for p in group["params"]]
            settings += [v for name, v in group.items() if name not in ("params", "lr")]
        settings += [self.optimizer.diagnose, self.optimizer.options]
        if settings != self._settings:
            self._plans, self._settings = {}, settings

    def _hashable(self, key: Any) -> bool:
        """Whether batches of this kind can be told from others."""
        try:
            hash(key)
        except TypeError as error:
            self._give_up(f"an argument can't be told from others ({first_line(error)})")
        return not self.reason

    def _usual(self, inputs: Sequence[Tensor]) -> bool:
        """Whether nothing is in the way of running from the record at this call."""
        if self.optimizer.engine.company.ranks.several:
            self._give_up("several ranks train together")
        elif has_hooks(self.optimizer):
            self._give_up("an optimizer has step hooks")
        elif any(t.requires_grad for t in inputs):
            self._give_up("an argument requires gradients")
        elif decisions.traced():  # in another thread
            return False
        return not self.reason and all(0 <= rate < math.inf for rate in self._rates.numbers)

    def _give_up(self, why: str) -> None:
        """From now on iterations run as they are written."""
        self.reason = why
        self._plans = {}
        self._said.append(f"{why}; iterations run as they are written")

    def _hint(self) -> str:
        """The usual reason, where an optimizer is wrapped."""
        unfused = [
            group
            for group in self.optimizer.param_groups
            if "fused" in group and not (group["fused"] or group.get("capturable"))
        ]
        return "; make the wrapped optimizer with fused=True" if unfused else ""

    def _missed(self, key: Any, plan: Plan, args: Any, kwargs: Any) -> Any:
        self.missed += 1
        plan.misses += 1
        if plan.misses >= MISSES:
            self._plans[key] = WARM
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
                f"a recorded iteration differs from the code by {off:.0%}: perhaps something else "
                "than the batch and the weights changes from call to call"
            )
            return made
        plan.verified = True
        if any(t.device.type == "cuda" for t in plan.changed):
            try:
                plan.capture_graph(inputs, self._rates.tensors)
            except RuntimeError as error:
                self._give_up(f"a CUDA graph can't hold the iteration ({first_line(error)})")
        return made

    def _first_run(self, plan: Plan, inputs: list[Tensor]) -> Outcome | None:
        """A run that may have to be compiled; what the compiler can't do is run as it is."""
        if not plan.compiled:
            return plan(inputs, self._rates.tensors)
        try:
            return plan(inputs, self._rates.tensors)
        except Exception as error:  # whatever a compiler may raise; shown, and done without it
            self._said.append(
                f"torch.compile failed ({first_line(error)}); the recorded operators are run one "
                "by one"
            )
            plan.interpret()
            return plan(inputs, self._rates.tensors)


def capture(optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False) -> CapturedStep:
    """A whole training iteration as one function of the batch, run without its Python code.

    The first iterations run as they are written. One is recorded: every operator of the forward
    pass, the backward pass and the step. The next one is run both ways and compared. From then on
    the operators are run by themselves: on a GPU as one CUDA graph, on the CPU one after another,
    or compiled by `torch.compile` into few kernels.

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
