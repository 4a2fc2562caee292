# SPDX-License-Identifier: MIT
"""Whether the uses that are known account for the gradients that arrive.

In every time step a gradient at the layer's output, and at each tensor that is used there from an
earlier step, comes from what the step makes and later ones use: every such use has a gradient of
its own. Whatever is missing comes from a use that nobody has seen, such as a loss of a feature that
the model has put aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge

from ddpnopt.crossing import Crossing
from ddpnopt.inert import Probing, probe
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.typing import Tensor

#: What goes into a time step: its layer's output, or a tensor of an earlier step.
Part = Stage | Crossing
#: Those of one step, with their edges.
Sources = Sequence[tuple[Part, GradientEdge]]


@dataclass
class Accounts:
    """Of one backward pass.

    Attributes:
        known: What has been accounted for, by part.
        sizes: The sum of the norms of its terms, which may cancel.
    """

    known: dict[Part, Tensor] = field(default_factory=dict)
    sizes: dict[Part, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Another backward pass begins, or this one is over."""
        self.known.clear()
        self.sizes.clear()

    def add(self, edge: GradientEdge, G: Tensor, sources: Sources) -> None:
        """A later use of what a step has made has its gradient: pull it back to the step's parts.

        The graph of that step has not been freed yet.

        Args:
            edge: Of what was made.
            G: The gradient of one use.
            sources: Of the step.
        """
        with Probing():
            found = probe(edge, [one for _, one in sources], G)
        for (part, _), g in zip(sources, found, strict=True):
            if g is not None:
                known = part in self.known
                self.sizes[part] = self.sizes[part] + g.norm() if known else g.norm()
                self.known[part] = self.known[part] + g if known else g

    def settles(self, part: Part, G: Tensor) -> bool:
        """Whether a part's gradient is what its step's uses say."""
        known = self.known.pop(part, None)
        gap = G if known is None else G - known
        size = G.norm() + self.sizes.pop(part, 0.0)
        tolerance = max(64 * torch.finfo(G.dtype).eps, 1e-4)
        # What is not finite shows nothing, and has an error of its own.
        return not bool(gap.norm() > tolerance * size)


def unseen(trajectory: Trajectory, part: Part) -> bool:
    """Whether uses of what a step makes may be unknown to the watch itself.

    Args:
        trajectory: The pass.
        part: Goes into the step.
    """
    time = part.time if isinstance(part, Stage) else part.used
    last = trajectory.stages[-1].time
    own = isinstance(part, Stage) and part in trajectory.heads
    return own or time >= last or any(s.born <= time < s.used for s in trajectory.blind)


def maker(trajectory: Trajectory, part: Part) -> str:
    """The layer in whose time step a part is used, by name."""
    time = part.time if isinstance(part, Stage) else part.used
    return next((s.name for s in trajectory.stages if s.time == time), "")
