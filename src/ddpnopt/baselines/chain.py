# SPDX-License-Identifier: MIT
"""What the optimal-control methods share: they move the layers of a chain, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch.autograd.graph import GradientEdge

from ddpnopt.engine import Engine
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.report import Report, StepReport
from ddpnopt.stages import Trajectory
from ddpnopt.typing import Tensor


class ChainEngine(Engine):
    """An engine without plain steps: a parameter that the method does not move is refused."""

    #: What the message calls the method.
    title: ClassVar[str] = "this method"
    graphs, alone = False, "a method of optimal control"

    def step(self, closure: Callable[[], float] | None = None) -> Report:
        """Take one step; passes of empty batches are left out, and where all are, nothing moves.

        Raises:
            RuntimeError: Detached.
            UnsupportedModelError: A parameter lies outside the chain (named).
        """
        if self.recorder is None:
            raise RuntimeError(
                f"the optimizer is detached from its model, and {self.title} has no plain step: "
                "make a new one"
            )
        passes: list[Trajectory] = []
        if self.recorder is not None and (completed := self.recorder.arrivals.completed):
            passes = [t for t in completed if t.stages[-1].rows]
            if not passes:
                return StepReport("off", "none", skipped=self.skipped)
            self.recorder.arrivals.completed = list(passes)
        if not any(t.refusal or t.error or not t.owned for t in passes):  # said better elsewhere
            self._refuse_outsiders(passes)
        return super().step(closure)

    def _at_boundary(self, trajectory: Trajectory, G: Tensor, edge: GradientEdge) -> None:
        """Nothing is weighted there: what lies in front is refused at the step."""

    def _refuse_outsiders(self, passes: Sequence[Trajectory]) -> None:
        if not passes and self.recorder is not None and self.recorder.anatomy.layers():
            return  # no backward pass
        inside = {id(p) for t in passes for s in t.active for p in s.module.parameters()}
        for p, name in self.names().items():
            if self.trainable(p) and p.grad is not None and id(p) not in inside:
                raise UnsupportedModelError(
                    f"'{name}' is not in a layer of the recorded chain: {self.title} is for dense "
                    "and convolutional chains, without branches or mixing of samples; freeze the "
                    "parameter, leave it out of params, or use DDPNOpt"
                )
