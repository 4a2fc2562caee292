# SPDX-License-Identifier: MIT
"""A training iteration that is recorded once and then run without its Python code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddpnopt.captured import calls
from ddpnopt.captured.calls import Work
from ddpnopt.captured.plan import Plan
from ddpnopt.captured.recording import Outcome, told
from ddpnopt.captured.records import Records
from ddpnopt.captured.tracing import Tracer
from ddpnopt.report import StepReport
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor


class CapturedStep(Records):
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

    what = "iteration"

    def __init__(
        self, optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False
    ) -> None:
        super().__init__(optimizer, compile=compile)
        self.loss = loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run an iteration: gradients cleared, forward pass, backward pass, step.

        Returns:
            What the loss function returns, without graphs.

        Raises:
            Exception: As the iteration does.
        """
        leaves, tree = tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, torch.Tensor)]
        kind = tree, calls.autocast_of(inputs), tuple(map(calls.kind_of, leaves))
        work = Work(
            kind, inputs, lambda: self._plain(args, kwargs), lambda: self._traced(args, kwargs)
        )
        recordable = not self.reason and self._hashable(kind)
        made = self._run(work) if recordable else self._as_written(work)
        self.say(stacklevel=2)
        return made

    def _plain(self, args: Any, kwargs: Any) -> Any:
        self.optimizer.zero_grad()
        made = self._iteration(args, kwargs)
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

    def _traced(self, args: Any, kwargs: Any) -> tuple[list[Tensor], Callable[[], Any]]:
        self.optimizer.zero_grad()
        # Of copies: the loss function may know these tensors by another way, too.
        args, kwargs = tree_map(calls.copied, (args, kwargs))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        return inputs, lambda: self._iteration(args, kwargs)

    def _record(self, key: tuple[Any, Any], work: Work) -> Any:
        made = super()._record(key, work)
        self.optimizer.zero_grad()
        # Copies: what was made from numbers alone is the record's own.
        return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, made)

    def _verify(self, plan: Plan, work: Work) -> Any:
        made = super()._verify(plan, work)
        self.optimizer.zero_grad()
        return made

    def _report(self, made: Any) -> tuple[Any, StepReport | None]:
        return made, self.optimizer.last_step

    def _object(self, tracer: Tracer, made: Any, inputs: Sequence[Tensor | None]) -> None:
        calls.look_again(tracer, made, calls.parameters_of_others(self.optimizer, self._modules))

    def _obstacle(self, inputs: Sequence[Tensor | None]) -> str:
        if calls.has_hooks(self.optimizer):
            return "an optimizer has step hooks"
        if any(t is not None and t.requires_grad for t in inputs):
            return "an argument requires gradients"
        return super()._obstacle(inputs)

    def _keep(self, plan: Plan, outcome: Outcome) -> Any:
        plan.commit(outcome)
        self.optimizer.last_step = told(outcome, self.optimizer.skipped)
        return outcome.made
