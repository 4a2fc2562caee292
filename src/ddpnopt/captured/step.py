# SPDX-License-Identifier: MIT
"""A training iteration that is recorded once and then run without its Python code."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddpnopt import decisions
from ddpnopt.captured.plan import Outcome, Plan, Recording, Slot
from ddpnopt.captured.tracing import Tracer
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist

#: Iterations run as written before one is recorded: the first ones check the layers' maps.
WARM = 4
#: Kinds of batches that have a program of their own; others run as written.
PLANS = 8
#: Recordings that turn out to look into the model's structure, or can't be run again, before it is
#: given up: now and then a step does more than usual.
POSTPONED, REFUSED = 50, 3
#: Runs in a row with other decisions before the iteration is recorded anew.
MISSES = 3
#: Recordings in a row that were run fewer times than this before it is given up.
FRUITLESS, FRUITFUL = 3, 20
#: How far a run may be from the code's step, as a share of it; and with half precision or TF32.
CLOSE, CLOSE_COARSE = 1e-3, 5e-2


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
        self._plans: dict[Any, Plan | int] = {}
        self._fruitless = self._postponed = self._refused = 0
        self._rates: list[Tensor] = []
        self._known_rates: list[Any] = []
        self._settings: list[Any] = []
        self._modules = list(optimizer.model.modules())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run an iteration: gradients cleared, forward pass, backward pass, step.

        Returns:
            What the loss function returns, without graphs.

        Raises:
            Exception: As the iteration does.
        """
        if self.reason:
            return self._as_written(args, kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, torch.Tensor)]
        key = (tree, tuple(map(_kind, leaves)))
        self._watch_settings()
        plan = self._plans.get(key, 0)
        if isinstance(plan, int):
            if plan < WARM or not self._usual():
                if key in self._plans or len(self._plans) < PLANS:
                    self._plans[key] = plan + 1
                return self._as_written(args, kwargs)
            return self._record(key, inputs, args, kwargs)
        if not self._usual() or not plan.current():
            del self._plans[key]
            return self._as_written(args, kwargs)
        self._set_rates()
        if not plan.verified:
            return self._verify(plan, inputs, args, kwargs)
        outcome = plan(inputs, self._rates)
        if outcome is None:
            return self._missed(key, plan, args, kwargs)
        plan.misses, plan.runs = 0, plan.runs + 1
        insist(lambda: self._commit(plan, outcome))
        self.replayed += 1
        return outcome.made

    # As written -----------------------------------------------------------------------------

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

    # Recording ------------------------------------------------------------------------------

    def _record(self, key: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run an iteration as it is written, and take it down."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        self._make_rates()
        tracer = Tracer()
        with self._as_tensors() as (state, numbers), self._traced_rates():
            for t in (*inputs, *self._rates, *(old for _, old in state)):
                tracer.value(t)
            with decisions.tracing(tracer), tracer:
                made = self._iteration(args, kwargs)
                sound = tracer.conclude()
            self.written += 1
            self._look_at_numbers(tracer, numbers)
            if not (tracer.refusal or tracer.postponed):
                copies = optimizer.engine.copies
                recording = Recording(
                    tracer, sound, inputs, self._rates, state, made, optimizer.last_step, copies
                )
                self._plans[key] = Plan(recording, self._compiled)
        optimizer.zero_grad()
        if tracer.postponed:
            self._postponed += 1
        elif tracer.refusal:
            self._refused += 1
        if self._postponed >= POSTPONED or self._refused >= REFUSED:
            unsettled = "the model's structure is still being found out"
            self._give_up(unsettled if tracer.postponed else tracer.refusal + self._hint())
        return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, made)

    @contextmanager
    def _as_tensors(self) -> Iterator[tuple[list[tuple[Slot, Tensor]], list[tuple[Slot, Any]]]]:
        """Numbers of the optimizer's state become tensors, and stay so if a plan is made."""
        slots, numbers = [], []
        before = dict(self._plans)
        for slot, device in self._places():
            value = slot.found
            if isinstance(value, int | float) and not isinstance(value, bool):
                wide = torch.float32 if device.type == "mps" else torch.float64
                slot.put(torch.tensor(float(value), dtype=wide, device=device))
                numbers.append((slot, type(value)))
            if isinstance(slot.found, torch.Tensor):
                slots.append((slot, slot.found))
        try:
            yield slots, numbers
        finally:
            if self._plans == before:
                for slot, kind in numbers:
                    slot.put(kind(slot.found))

    def _places(self) -> Iterator[tuple[Slot, torch.device]]:
        optimizer = self.optimizer
        for p, state in optimizer.state.items():
            for name in list(state):
                yield Slot(partial(_state, optimizer, p), name), p.device
        engine = optimizer.engine
        device = engine.parameters()[0].device
        for name in list(engine.running):
            yield Slot(lambda: engine.running, name), device
        for inner in getattr(optimizer, "inners", ()):
            for p in list(inner.gains):
                yield Slot(partial(getattr, inner, "gains"), p), p.device

    def _look_at_numbers(self, tracer: Tracer, numbers: Sequence[tuple[Slot, Any]]) -> None:
        """What was a number, and is one again, has been computed by the host."""
        for slot, _ in numbers:
            if not isinstance(slot.found, torch.Tensor):
                tracer.refuse(f"the optimizer keeps a number ('{slot.key}')")

    # Rates ----------------------------------------------------------------------------------

    def _make_rates(self) -> None:
        if len(self._rates) != len(self.optimizer.param_groups):
            self._rates = [_rate_of(group["params"]) for group in self.optimizer.param_groups]
            self._known_rates = []
        self._set_rates()

    def _set_rates(self) -> None:
        now = [group["lr"] for group in self.optimizer.param_groups]
        if now != self._known_rates:
            for rate, value in zip(self._rates, now, strict=True):
                rate.fill_(value)
            self._known_rates = now

    @contextmanager
    def _traced_rates(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr

    # Watching -------------------------------------------------------------------------------

    def _watch_settings(self) -> None:
        """Other settings than those of the recordings make them void."""
        settings: list[Any] = [m.training for m in self._modules]
        for group in self.optimizer.param_groups:
            settings += [p.requires_grad for p in group["params"]]
            settings += [v for name, v in group.items() if name not in ("params", "lr")]
        settings += [self.optimizer.diagnose, self.optimizer.options]
        if settings != self._settings:
            self._plans, self._settings = {}, settings

    def _usual(self) -> bool:
        """Whether nothing is in the way of running from the record at this call."""
        optimizer = self.optimizer
        if optimizer.engine.company.ranks.several:
            self._give_up("several ranks train together")
        elif optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            self._give_up("the optimizer has step hooks")
        rates = [group["lr"] for group in optimizer.param_groups]
        return not self.reason and all(0 <= rate < math.inf for rate in rates)

    def _give_up(self, why: str) -> None:
        """From now on iterations run as they are written."""
        self.reason = why
        self._plans = {}
        warnings.warn(
            f"capture: {why}; iterations run as they are written", DDPNOptWarning, stacklevel=4
        )

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

    # Running --------------------------------------------------------------------------------

    def _commit(self, plan: Plan, outcome: Outcome) -> None:
        for slot, tensor in zip(plan.slots, outcome.state, strict=True):
            slot.put(tensor)
        self.optimizer.report_later(outcome.report)

    def _verify(self, plan: Plan, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run an iteration from the record and as it is written, and keep the latter's.

        Another run from the record, with weights off by their rounding, tells how far runs may be
        apart that are equal but for rounding.
        """
        before = [t.clone() for t in plan.changed]
        states = [slot.tensor for slot in plan.slots]
        outcome = self._first_run(plan, inputs)
        if outcome is None:
            return self._as_written(args, kwargs)

        def after(states: Sequence[Tensor]) -> list[Tensor]:
            return [t.clone() for t in (*plan.changed, *states)]

        replayed = after(outcome.state)
        plan.restore()
        for t in plan.changed:
            if t.is_floating_point():
                t.mul_(1 + 8 * torch.finfo(torch.promote_types(t.dtype, torch.float32)).eps)
        shaken = [t.clone() for t in plan.changed]
        another = plan(inputs, self._rates)
        nearby = None if another is None else after(another.state)
        for t, old in zip(plan.changed, before, strict=True):
            t.copy_(old)
        made = self._as_written(args, kwargs)
        if nearby is None:
            return made
        written = after([slot.tensor for slot in plan.slots])
        # Weights by what the step has changed, states by what they are: some hardly change.
        starts = (
            [*before, *map(torch.zeros_like, states)],
            [*shaken, *map(torch.zeros_like, states)],
        )
        off = max(map(_apart, replayed, written, nearby, *starts), default=0.0)
        self.optimizer.zero_grad()
        if not off <= (CLOSE_COARSE if plan.half or _tf32(plan.changed) else CLOSE):
            self._give_up(
                f"a recorded iteration differs from the code by {off:.0%} of the step: something "
                "else than the batch and the weights changes from call to call"
            )
            return made
        plan.verified = True
        if any(t.device.type == "cuda" for t in plan.changed):
            try:
                plan.capture_graph(inputs, self._rates)
            except RuntimeError as error:
                self._give_up(f"a CUDA graph can't hold the iteration ({_first_line(error)})")
        return made

    def _first_run(self, plan: Plan, inputs: list[Tensor]) -> Outcome | None:
        """A run that may have to be compiled; what the compiler can't do is run as it is."""
        if not plan.compiled:
            return plan(inputs, self._rates)
        try:
            return plan(inputs, self._rates)
        except Exception as error:  # whatever a compiler may raise; shown, and done without it
            warnings.warn(
                f"capture: torch.compile failed ({_first_line(error)}); the recorded operators are "
                "run one by one",
                DDPNOptWarning,
                stacklevel=4,
            )
            plan.interpret()
            return plan(inputs, self._rates)


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
        compile: Compile the program; takes from ten seconds to a minute, and a C++ compiler on the
            CPU.

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


def _state(optimizer: Shell, p: Tensor) -> dict[Any, Any]:
    """A parameter's state, wherever it is now: loading replaces it."""
    found: dict[Any, Any] = optimizer.state.get(p, {})
    return found


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _kind(leaf: Any) -> Any:
    """What a program depends on of an argument: its value where it is no tensor."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return leaf


def _rate_of(parameters: Sequence[Tensor]) -> Tensor:
    """Room for a learning rate, as exact as the widest parameter."""
    wide = torch.float32
    for p in parameters:
        wide = torch.promote_types(wide, p.dtype)
    device = parameters[0].device if parameters else None
    return torch.zeros((), dtype=wide, device=device)


def _tf32(changed: Sequence[Tensor]) -> bool:
    """Whether products of 32 bits may be rounded to TensorFloat-32."""
    coarse = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return coarse and any(t.is_cuda and t.dtype == torch.float32 for t in changed)


def _apart(
    replayed: Tensor, written: Tensor, nearby: Tensor, before: Tensor, shaken: Tensor
) -> float:
    """How far a replayed step is from the written one, beyond what rounding explains.

    Args:
        replayed: A tensor after a run from the record.
        written: After the code's step.
        nearby: After a run from the record from weights off by their rounding.
        before: Before the first two.
        shaken: Before the third.

    Returns:
        A share of what the step has changed.
    """
    if not written.is_floating_point():
        return 0.0 if torch.equal(replayed, written) else math.inf
    wide = torch.promote_types(written.dtype, torch.float32)
    a, b, c, start, other = (t.to(wide) for t in (replayed, written, nearby, before, shaken))
    rounding = 8 * torch.finfo(written.dtype).eps * float(b.norm())
    explained = rounding + 10 * float(((c - other) - (a - start)).norm())
    beyond, size = max(0.0, float((a - b).norm()) - explained), float((b - start).norm())
    if size > 0:
        return beyond / size
    return math.inf if beyond > 0 else 0.0
